"""Text from models: sampling, beams, long contexts, folded and quantized weights."""
