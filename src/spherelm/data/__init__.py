"""Text in, batches out: tokenizers, `prepare`, memory-mapped token shards, the loader, and the text that ships."""
