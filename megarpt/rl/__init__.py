"""Reinforcement learning: prompts, rollouts, verifiable rewards, advantages, and the loop over them."""
