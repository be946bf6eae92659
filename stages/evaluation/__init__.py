"""Compare models with their base: accuracy, answers, tasks, speed."""
