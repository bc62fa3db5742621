"""Reading and writing SAEs: SAELens's layout (ours too), dictionary_learning's and sparsify's."""
