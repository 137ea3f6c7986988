"""What distillation matches: experts, their trajectories on disk and on the Hub, and what a set starts from."""
