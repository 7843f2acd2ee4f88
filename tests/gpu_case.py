"""What the benchmark of the persistent kernels records, as it could be."""

ROW = {"group": "bf16", "backend": "persistent", "T": 64, "B": 16, "H": 512, "mode": "inference", "us_per_step": 23.4}
TIMES = {"ours_ms": 1.5, "theirs_ms": 3.0, "ratio": 2.0, "ratio_p20": 1.9, "ratio_p80": 2.1, "pairs": 20}
MEMORY = {"peak_mib": 10.0, "nn_lstm_peak_mib": 12.0, "nn_lstm": {"launches": 130, "commonest": []}}
FULL_ROW = {**ROW, **TIMES, **MEMORY}
SIZES = {"T": 1000, "B": 16, "H": 512, "dtype": "bf16"}
KERNELS = {**SIZES, "inference": {"us_per_step": 0.91}}
MODULES = {**SIZES, "backward": {**TIMES, "us_per_step": 1.5}}
