"""Likelihoods over orders and schedules that a model was not trained on: plans and reports."""
