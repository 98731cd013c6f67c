"""The environment of a growth policy: tasks, hosts in training as a Gymnasium `VectorEnv`, and their reward."""
