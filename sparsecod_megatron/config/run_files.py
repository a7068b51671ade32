"""Names of what a run directory holds: a contract with scripts that read runs, where every folder can import it."""

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
STATISTICS_FILE = "layer_statistics.jsonl"
LOG_FILE = "log.txt"
VERSIONS_FILE = "versions.jsonl"
TOKENIZER_DIR = "tokenizer"
CHECKPOINTS_DIR = "checkpoints"
