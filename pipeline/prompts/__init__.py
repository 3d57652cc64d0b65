"""Better prompts without new weights: searches over prompt templates, and the models that criticise and edit them."""
