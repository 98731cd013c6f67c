"""What has imported torch before a rank begins: the process that forks ranks."""
