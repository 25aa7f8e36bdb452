"""What MoBA does to a trained model: loss, retrieval, routing, recall; and the figures of it."""
