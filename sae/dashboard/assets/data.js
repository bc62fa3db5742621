// -- data -------------------------------------------------------------------------------------------------------------
// Shards are scripts that call window.__shard(name, data); those that are not in the page are loaded when needed.
const shards = window.__shards;
const waiting = new Map();
window.__shard = (name, data) => { shards[name] = data; };

function load(name) {
  if (name in shards) return Promise.resolve(shards[name]);
  if (!waiting.has(name)) {
    waiting.set(name, new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = "data/" + name + ".js";
      script.onload = () => resolve(shards[name]);
      script.onerror = () => { waiting.delete(name); reject(new Error(script.src)); };
      document.head.append(script);
    }));
  }
  return waiting.get(name);
}

const head = shards.head;
const table = head.table;
const second = head.second ?? null;
const place = new Map(table.id.map((id, index) => [id, index]));
const dead = new Set(head.dead);
const special = new Set(head.special);
const texts = new Map();
head.top_text[0].forEach((id, index) => texts.set(id, head.top_text[1][index]));

// What the pages are of: latents of an SAE, or named directions.
const ONE = head.directions ? "direction" : "latent";
const MANY = ONE + "s";
const capital = (word) => word[0].toUpperCase() + word.slice(1);
const titleOf = (id) => (table.name && place.has(id) ? visible(table.name[place.get(id)], true) : capital(ONE) + " " + id);

async function loadTexts() {
  const data = await load("tokens");
  if (texts.complete) return;
  data.ids.forEach((id, index) => texts.set(id, data.text[index]));
  texts.complete = true;
}

async function row(number) {
  let shard = 0;
  while (shard + 1 < head.row_shards.length && head.row_shards[shard + 1] <= number) shard += 1;
  return (await load("rows-" + shard))[number - head.row_shards[shard]];
}

async function record(index) {
  const [data] = await Promise.all([load("latents-" + Math.floor(index / head.per_shard)), loadTexts()]);
  return data[index % head.per_shard];
}
