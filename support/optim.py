"""support/optim.py -- what computes a step: AdamW, or Muon for matrices beside it, in bf16."""
from contextlib import contextmanager, nullcontext
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

class Muon(torch.optim.Muon):
    """torch's (Keller Jordan, 2024), but all matrices of a size take their Newton-Schulz steps at
    once, and in fp32 unless bf16. Tall matrices take longer steps, as in its "original"."""
    bf16 = False

    @torch.no_grad()
    def step(self):
        group, = self.param_groups
        params, grads, buffers = [], [], []
        self._init_group(group, params, grads, buffers)
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov's
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        sizes = {}
        for p, update in zip(params, updates, strict=True):
            tall = max(1, len(p) / p.shape[1]) ** 0.5  # such lie down: smaller squares
            views = (p.T, update.T, tall) if tall > 1 else (p, update, tall)
            sizes.setdefault(views[0].shape, []).append(views)
        for views in sizes.values():
            flat, updates, scale = zip(*views, strict=True)
            x = torch.stack(updates)
            new = orthogonal(x.bfloat16() if self.bf16 else x, group).to(x.dtype)
            new *= torch.tensor(scale).view(-1, 1, 1).to(new)
            torch._foreach_add_(flat, [*new], alpha=-group["lr"])

def orthogonal(x: torch.Tensor, group: dict) -> torch.Tensor:
    """(n, rows, columns) -> nearly the closest matrices whose singular values are all 1."""
    a, b, c = group["ns_coefficients"]
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):  # a x + b (x x') x + c (x x')^2 x
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x

def make(cfg, model) -> list[torch.optim.Optimizer]:
    """-> [AdamW] or [AdamW, Muon], the latter for all matrices but embeddings and the head."""
    rows = "llm.model.embed_tokens.weight", "llm.lm_head.weight", "new_rows"  # one for each token
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in trained.items() if p.dim() == 2 and name not in rows}
    matrices = matrices if cfg.optimizer == "muon" else {}
    rest = [p for name, p in trained.items() if name not in matrices]
    groups = [dict(params=[p for p in rest if p.dim() >= 2], weight_decay=cfg.weight_decay),
              dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, cfg.lr, (0.9, cfg.beta2), fused=True)]
    if matrices:
        optimizers.append(Muon([dict(params=[*matrices.values()], times=cfg.muon_lr / cfg.lr)],
                               cfg.muon_lr, cfg.weight_decay))
        optimizers[1].bf16 = use_bf16(model.device.type, cfg.bf16)
    return optimizers

def update(optimizers: list, lr: float, forget: bool) -> None:
    """A step at this learning rate. forget: gradients become None; else they become 0."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("times", 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=forget)

def describe(optimizers: list) -> str:
    shares = [(type(o).__name__, [p for group in o.param_groups for p in group["params"]])
              for o in optimizers]
    return "; ".join(f"{name}: {len(ps)} tensors, {sum(p.numel() for p in ps):,} parameters"
                     for name, ps in shares)

def use_bf16(device: str, wanted: bool) -> bool:
    """GPUs always; a CPU if it is wanted, and has instructions for it: else it would crawl."""
    return device == "cuda" or wanted and bool(torch.cpu.get_capabilities().get("avx512_bf16"))

@contextmanager
def autocast(device: str, bf16: bool):
    """A context for the forward: products in bf16, or as they are. On a CPU attention is then
    spelled out, for the backward of the fused one takes four times as long in bf16 as in fp32."""
    on = use_bf16(device, bf16)
    spelled_out = sdpa_kernel(SDPBackend.MATH) if on and device == "cpu" else nullcontext()
    with torch.autocast(device, torch.bfloat16, enabled=on), spelled_out:
        yield
