"""What a trained model's weights look like: pure measurements, and the figures drawn from them."""
