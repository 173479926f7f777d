"""support/meter.py -- what a training run measures: its log, its loss, how busy the GPU is."""
import json
import sys
from importlib import import_module
from pathlib import Path
import torch
from torch import nn
from tqdm import tqdm
from support.cli import as_user_error, write_text
from support.recipes import TABLES

def count(module: nn.Module, trained_only: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)

def metrics(path: Path, until: float) -> str:  # the lines to a step; a kill cuts a line short
    lines = path.read_text().splitlines() if path.exists() else []
    whole = (line for line in lines if line.endswith("}"))
    return "".join(f"{line}\n" for line in whole if json.loads(line)["step"] <= until)

class Silent:  # the Log of the other ranks: nothing happens
    write = note = close = staticmethod(lambda row=None: None)

class Log:
    """Rank 0's log: metrics.jsonl, a bar, and what --log names; rows after `start` go."""
    def __init__(self, cfg, start: int):
        self.path, self.tracker = Path(cfg.out, "metrics.jsonl"), None
        write_text(self.path, metrics(self.path, start))
        with as_user_error(f"--log {cfg.log}: ", Exception, suffix=f" (pip install {cfg.log}?)"):
            if cfg.log != "none":  # wandb, or trackio, which is called alike
                self.tracker, group = import_module(cfg.log), Path(cfg.out).resolve().name
                self.tracker.init(project="nanoborealis", group=group, config=vars(cfg))
        self.bar = tqdm(total=cfg.steps, initial=start, desc="training", unit="step",
                        mininterval=0.1 if sys.stderr.isatty() else 10)  # seconds; 10 in a file
    def write(self, row: dict):
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")
        figures = {k: v for k, v in row.items() if k != "step"}
        if self.tracker:
            self.tracker.log(figures, step=row["step"])
        self.bar.set_postfix(figures, refresh=False)
        self.bar.update()
    def note(self, text: str):  # a line on standard error, above the bar
        self.bar.write(text, file=sys.stderr)
    def close(self):
        self.bar.close()
        if self.tracker:
            self.tracker.finish()

# ---- What full size needs
KEPT = 65.9  # x D bytes that autograd keeps of a token in a layer, with LoRA; measured by a test

def memory(model, tokens: int, labels: int, checkpoint: bool, ranks: int = 1) -> dict[str, float]:
    """Bytes that a training step takes on a GPU, on paper: bf16 with fp32 masters of what trains.
    tokens, labels: of a micro-batch. checkpoint: --grad_checkpoint. ranks: that --shard the LLM."""
    D, trained = model.config.llm_config, count(model, trained_only=True)
    encoder, layers = count(model.encoder), model.llm.model.layers
    kept, bf16, gradients = KEPT * tokens * D.hidden_size, 2 * trained, 4 * trained / ranks
    if ranks > 1:  # whole are two layers at a time, and the embeddings all along; one's gradients
        bf16 = 2 * (count(model.llm) - count(layers)) + 4 * count(layers[0])
        learned = count(model.llm, trained_only=True) - count(layers, trained_only=True)
        gradients += 2 * learned + 6 * count(layers[0], trained_only=True)  # bf16, and fp32 to send
    # Checkpointed, a layer keeps its bf16 input, and one layer at a time the rest.
    kept *= 1 + D.num_hidden_layers * 2 / KEPT if checkpoint else D.num_hidden_layers
    return {"weights": 2 * encoder + (2 * trained + 2 * (count(model) - encoder)) / ranks,
            "gradients": gradients, "AdamW": 8 * trained / ranks, "bf16 copies": bf16,
            "activations": kept, "logits": labels * D.vocab_size * (2 + 4 + 4 + 2)}

# ---- MFU: FLOPs that a step needs, over those that the GPU could do
def step_flops(model, tokens: float, squares: float, windows: float, labels: float) -> float:
    """FLOPs of a step, without padding and checkpointing: per weight and token 2 forward, 2 where a
    gradient passes through, 2 where the weight learns. squares: sum of the squared row lengths."""
    c, E, D = model.config, model.config.encoder_config, model.config.llm_config
    T, learns = E.max_source_positions, 2 * ("encoder" not in c.frozen)
    def cost(module, backward=2):  # of a token
        weights = [m.weight for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv1d))]
        return sum(w.numel() * (2 + backward + 2 * w.requires_grad) for w in weights)
    conv1 = 2 * model.encoder.conv1.weight.numel()  # at 2 T places, but its input has no gradient
    attention = 2 * E.d_model * T * E.encoder_layers * (2 + 2 * learns)
    # Behind a frozen encoder, no gradient has to pass through the adapter's first matrix.
    adapter = cost(model.adapter) - (2 - learns) * model.adapter.w_in.weight.numel()
    window = T * (cost(model.encoder, learns) + conv1 + attention) + c.tokens_per_window * adapter
    # Causal attention needs half of each square, for QK and for AV.
    causal = 2 * squares * D.num_attention_heads * D.head_dim * D.num_hidden_layers
    head = labels * D.vocab_size * D.hidden_size * (4 + 2 * model.llm.lm_head.weight.requires_grad)
    return windows * window + tokens * cost(model.llm.model) + 3 * causal + head

def speed(model, total: dict, s: float, world: int, device: torch.device) -> dict:
    """Columns of a row: how fast a step of s seconds was. total: its counts on all ranks."""
    row = dict(ms=s * 1e3, tokens_per_s=total["tokens"] / s, audio_s_per_s=total["seconds"] / s)
    if device.type == "cuda":
        row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        name, peaks = torch.cuda.get_device_name(device), TABLES["peak_tflops"]
        if peak := next((1e12 * peak for part, peak in peaks.items() if part in name), None):
            sizes = [total[key] for key in ("tokens", "squares", "windows", "labels")]
            row["mfu"] = step_flops(model, *sizes) / s / world / peak
    return row
