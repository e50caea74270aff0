"""Everything that makes the toy model of `src/penstock/toy`: data, tokenizer, training, scoring."""
