"""Continued pretraining with MoBA: arguments, data, the meter, and a Trainer that reports both attentions."""
