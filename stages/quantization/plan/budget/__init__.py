"""Spend a budget: what errors cost, and the best formats that fit."""
