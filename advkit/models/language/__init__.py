"""Language models: tokenizers with a chat template, decoders, and the model that scores transcripts."""
