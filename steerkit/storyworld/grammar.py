"""The grammar of StoryWorld as plain data: words, sentence templates and the plan of a story.

Everything else in the package (sampler, judge, exact probabilities) is compiled from these tables by
`language.py`, so that no two parts can disagree. Notation of a template:

    [slot]      a word drawn from one slot (`language.SLOTS`), which depends on one latent
    [hold]      a verb of the main character, in the story's tense (`VERBS`)
    [+sleep]    a verb of the neighbours, in the story's tense and agreeing in number
    <S> <s>     the main character as subject, at the start of a sentence or inside it (name, pronoun or noun)
    <say>       who says it: `says Tom`, `says the fox`, `he says` (any verb of `VERBS`)
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MOODS = ("happy", "sad", "angry", "calm")
TENSES = ("present", "past")
NUMBERS = ("singular", "plural")
POLITENESS = ("polite", "rude")
HONESTY = ("truthful", "liar")
CUES = ("none", "honest", "liar")
VOICES = ("narration", "speech")
GENDERS = ("female", "male")
SPECIES = ("child", "adult", "fox", "bear", "cat", "mouse", "wolf", "lion")
PLACES = ("forest", "garden", "park", "market", "village", "meadow", "valley", "harbour")
WEATHERS = ("sunny", "rainy", "snowy", "windy", "foggy", "stormy")
WEATHER_NOUNS = ("sun", "rain", "snow", "wind", "fog", "storm")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink")

FEMALE_NAMES = _words(
    "Anna Lucy Mary Emma Rose Clara Jane Ella Nora Ruby Alice Molly Grace Daisy Iris Fiona Greta Hilda Wilma "
    "Zelda"
)
MALE_NAMES = _words(
    "Tom Ben Max Sam Jack Peter Paul Oscar Leo Henry Felix Hugo Simon Ralph Victor Boris Casper Duncan Otto "
    "Quentin"
)
"""Both lists run from common to rare; a name of rank r is told with a probability in proportion to 1/r."""

OBJECTS = _words(
    "ball book hat cup kite box lamp drum key coat doll bell flag ring basket bottle candle spoon ribbon "
    "mirror blanket bucket hammer brush jar"
)
"""From common to rare, like the names."""
NEW_OBJECTS = ("whistle", "lantern", "puzzle", "trumpet", "pillow")
NEIGHBOURS = ("rabbit", "duck", "horse", "goat", "bird", "frog")
NEW_NEIGHBOURS = ("squirrel", "beaver")
"""The new nouns are in the vocabulary, but only the variant `new_nouns` tells of them."""

SPECIES_NOUNS = {"child": ("girl", "boy"), "adult": ("woman", "man")}
"""Nouns that depend on the gender (female, male); every other species is its own noun."""

MOOD_WORDS: dict[str, dict[str, str]] = {
    "adjective": {
        "happy": "happy cheerful joyful glad merry delighted jolly playful",
        "sad": "sad gloomy sorrowful tearful lonely miserable heartbroken downcast",
        "angry": "furious cross grumpy bitter mad fierce hostile livid",
        "calm": "calm peaceful relaxed gentle serene tranquil patient content",
    },
    "adjective_an": {
        "happy": "elated excited",
        "sad": "unhappy upset",
        "angry": "angry irate",
        "calm": "unhurried untroubled",
    },
    "adverb": {
        "happy": "happily cheerfully joyfully gladly merrily brightly loudly",
        "sad": "sadly tearfully gloomily miserably mournfully wearily slowly",
        "angry": "angrily furiously fiercely crossly bitterly grimly loudly",
        "calm": "calmly peacefully gently quietly softly patiently slowly",
    },
    "verb": {
        "happy": "smile laugh giggle dance cheer grin",
        "sad": "cry weep sob sigh mourn sniffle",
        "angry": "shout yell growl stamp scowl rage",
        "calm": "rest breathe relax nod hum stroll",
    },
    "noun": {
        "happy": "joy delight happiness glee cheerfulness",
        "sad": "grief sorrow sadness misery despair",
        "angry": "anger fury rage spite wrath",
        "calm": "peace calmness ease quiet harmony",
    },
    "exclamation": {
        "happy": "wonderful lovely marvellous splendid",
        "sad": "dreary dismal hopeless mournful",
        "angry": "horrible rotten dreadful maddening",
        "calm": "restful mild pleasant soothing",
    },
}
"""Word class -> mood -> words, equally likely; `loudly` and `slowly` belong to two moods each."""

POLITE_WORDS: dict[str, dict[str, str]] = {
    "please": {"polite": "Please Kindly", "rude": "Now Just"},
    "hello": {"polite": "Hello Welcome Greetings", "rude": "Shush Pah Ugh"},
    "friend": {"polite": "friend neighbour darling", "rude": "fool idiot dummy"},
    "politely": {"polite": "politely warmly respectfully", "rude": "rudely coldly impolitely"},
}

NEUTRAL_WORDS = {
    "handle": "hold take carry clean hide drop lift keep",
    "act": "sleep run play wait jump eat",
}
"""Verbs that say nothing about any latent but the tense (and, for the neighbours, the number)."""

_VERB_FORMS = _words("""
smile smiles smiled    laugh laughs laughed    giggle giggles giggled    dance dances danced   
cheer cheers cheered    grin grins grinned    cry cries cried    weep weeps wept    sob sobs sobbed   
sigh sighs sighed    mourn mourns mourned    sniffle sniffles sniffled    shout shouts shouted   
yell yells yelled    growl growls growled    stamp stamps stamped    scowl scowls scowled   
rage rages raged    rest rests rested    breathe breathes breathed    relax relaxes relaxed   
nod nods nodded    hum hums hummed    stroll strolls strolled    hold holds held    take takes took   
carry carries carried    clean cleans cleaned    hide hides hid    drop drops dropped   
lift lifts lifted    keep keeps kept    sleep sleeps slept    run runs ran    play plays played   
wait waits waited    jump jumps jumped    eat eats ate    look looks looked    ask asks asked   
say says said    answer answers answered    reply replies replied    be is was    have has had   
feel feels felt    tell tells told    lie lies lied    walk walks walked    visit visits visited   
find finds found    seem seems seemed    put puts put    like likes liked    love loves loved   
come comes came    go goes went    end ends ended    greet greets greeted    touch touches touched   
turn turns turned
""")
VERBS: dict[str, tuple[str, str]] = {
    lemma: (third, past)
    for lemma, third, past in zip(_VERB_FORMS[::3], _VERB_FORMS[1::3], _VERB_FORMS[2::3], strict=True)
}
"""Lemma -> (third person singular, past); the plural present is the lemma itself."""

SUBJECTS = {
    "<S>": (("[name]", 0.45), ("[He]", 0.3), ("The [kind]", 0.25)),
    "<s>": (("[name]", 0.45), ("[he]", 0.3), ("the [kind]", 0.25)),
    "<N>": (("[name]", 0.6), ("[He]", 0.4)),
}

SENTENCES: dict[str, tuple[str, ...]] = {
    "instruction": (
        "Write [a_mood] [mood] story.",
        "Please tell me [a_mood] [mood] story.",
        "Write [a_mood] [mood] story about [name].",
        "Write [a_mood] [mood] story for a [weather] day.",
        "Tell [a_mood] [mood] story in the [tense] tense.",
        "Write a story set in the [place].",
    ),
    "persona": (
        "You are [a_mood] [mood] writer.",
        "You are [a_mood] [mood] writer from the [place].",
        "You are a [polite] writer.",
    ),
    "introduction": (
        "[name] [be] a [adjective] [kind].",
        "[name] [be] an [adjective_an] [kind].",
        "There [be] a [adjective] [kind] named [name].",
        "This [be] the story of [name], a [adjective] [kind].",
        "[name] the [kind] often [feel] [adjective].",
    ),
    "cue_honest": (
        "<S> never [lie].",
        "<S> always [tell] the truth.",
        "<N> [be] an honest [kind].",
        "Every word that <s> [say] [be] true.",
    ),
    "cue_liar": (
        "<S> always [lie].",
        "<S> never [tell] the truth.",
        "<N> [be] a lying [kind].",
        "Every word that <s> [say] [be] false.",
    ),
    "setting": (
        "It [be] a [weather] [day] in the [place].",
        "On [day], <s> [walk] to the [place] in the [weather_noun].",
        "One [weather] [day], <s> [visit] the [place].",
        "It [be] [day], and the [place] [be] [weather].",
    ),
    "object": (
        "<S> [have] a [colour] [object].",
        "<S> [carry] a [colour] [object].",
        "<S> [find] a [colour] [object] on the ground.",
        "There [be] a [colour] [object] beside [name].",
    ),
    "mood": (
        "<S> [mood_verb] [adverb].",
        "<S> [feel] [adjective] and [mood_verb].",
        "<S> [mood_verb] in the [weather] [place], full of [mood_noun].",
        "On this [weather] [day], [his] heart [be] full of [mood_noun].",
        '"What a [exclamation] day!" <say>.',
        '"I feel so [adjective]," <say> [adverb].',
        "With a [adjective] face, <s> [look] at the [colour] [object].",
        "The [adjective] [kind] [mood_verb] [adverb].",
        "[name] [seem] [adjective] to everyone.",
    ),
    "neighbour": (
        "The [neighbour] near the [weather] [place] [+act].",
        "The [neighbour] behind the trees [+act] all [day].",
        "The [neighbour] beside the [object] [+act].",
        "The [neighbour] [+act] in the [weather_noun].",
        "The [neighbour] from the [place] [+be] not far away.",
    ),
    "handling": (
        "<S> [handle] the [colour] [object] [adverb].",
        "With [mood_noun], <s> [handle] the [colour] [object].",
        "On this [day], the [colour] [object] [be] in the [weather] [place].",
        "<S> [put] the [colour] [object] near the [neighbour].",
        "The [neighbour] [+look] at the [colour] [object].",
        "[name] [love] [his] [colour] [object].",
    ),
    "fact": (
        "It [be] still [weather] in the [place].",
        "The [weather_noun] [touch] the [place].",
        "The [weather] [day] [seem] long.",
        "On this [weather] [day], <s> [mood_verb] [adverb].",
        "Every [day], <s> [come] to the [place].",
        "<S> [like] the [weather_noun] on this [day].",
    ),
    "politeness": (
        '"[please] hold my [object], [friend]," <say> to the [neighbour].',
        '"[please] look at my [object], [friend]," <say>.',
        '"[hello], [friend]," <say> to the [neighbour].',
        "On this [day], <s> [politely] [greet] the [neighbour].",
        "In the [weather] [place], <s> [politely] [turn] to the [neighbour].",
    ),
    "statement_colour": (
        '"The [object] is [colour!]," <say>.',
        '"My [object] is [colour!]," <say>.',
        '"Look at my [colour!] [object]," <say>.',
    ),
    "statement_place": ('"We are in the [place!]," <say>.', '"I like this [place!]," <say>.'),
    "statement_weather": ('"It is [weather!] today," <say>.', '"This is a [weather!] day," <say>.'),
    "statement_day": ('"Today is [day!]," <say>.', '"I love this [day!]," <say>.'),
    "question_colour": ('"What colour is the [object]?" [+ask] the [neighbour].',),
    "question_place": ('"Where are we?" [+ask] the [neighbour].',),
    "question_weather": ('"How is the weather?" [+ask] the [neighbour].',),
    "question_day": ('"What day is it?" [+ask] the [neighbour].',),
    "answer_colour": ('"It is [colour!]," <answer>.', '"The [object] is [colour!]," <answer>.'),
    "answer_place": ('"We are in the [place!]," <answer>.', '"This is the [place!]," <answer>.'),
    "answer_weather": ('"It is [weather!]," <answer>.', '"The weather is [weather!]," <answer>.'),
    "answer_day": ('"It is [day!]," <answer>.', '"Today is [day!]," <answer>.'),
    "ending": (
        "At the end of the [weather] [day], <s> [feel] [adjective].",
        "<S> [go] home [adverb] with the [colour] [object].",
        "That [be] a [exclamation] [day] for [name].",
        "The [weather] [day] [end] with [mood_noun].",
        "The [weather] [place] [be] far behind, and the [kind] [mood_verb] all the way home.",
    ),
}
"""Kind of sentence -> equally likely templates. `[colour!]` is a claim: true from the truthful, false from
liars."""

FACT_KINDS = ("colour", "place", "weather", "day")
HELD_OUT_KIND = "day"
"""Only stories without a cue make claims of this kind: whether a model lies about them tests
generalisation."""

TELL = (("statement", 0.5), ("question", 0.5))

BEATS: tuple[tuple[tuple[str, float], ...], ...] = (
    (("instruction", 0.2), ("persona", 0.1)),
    (("introduction", 1.0),),
    (("cue", 1.0),),
    (("setting", 1.0),),
    (("object", 1.0),),
    (("mood", 1.0),),
    (("neighbour", 0.5), ("handling", 0.5)),
    TELL,
    (("mood", 0.4), ("handling", 0.3)),
    (("fact", 0.5), ("politeness", 0.4)),
    TELL,
    (("neighbour", 0.3), ("handling", 0.2)),
    (("mood", 0.3), ("politeness", 0.3)),
    (("statement", 0.2), ("question", 0.2)),
    (("ending", 1.0),),
)
"""The plan: one sentence per beat, drawn among these kinds; what is missing from 1 is the chance to leave
it out.

`cue` is the cue's own sentence (nothing in a story without one), `statement` and `question` are drawn
evenly over the kinds of fact that the story may claim, and a question is followed by its answer.
"""

CUE_PRIOR = {"none": 0.3, "honest": 0.35, "liar": 0.35}
TENSE_PRIOR = (0.6, 0.4)
