"""One case, played and judged: batches, engine, store, workers. Imports no attack and no scenario."""
