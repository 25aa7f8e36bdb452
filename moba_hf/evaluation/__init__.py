"""What MoBA does inside a trained model: routing and figures."""
