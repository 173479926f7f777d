"""support/optim.py -- what a step is made of: AdamW, or Muon for matrices beside it; bf16; CTC."""
from contextlib import contextmanager, nullcontext
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from data import TRANSCRIBE

class Muon(torch.optim.Muon):
    """torch's (Keller Jordan, 2024), but in fp32 unless bf16, and all of a shape at once."""
    bf16 = False
    @torch.no_grad()
    def step(self):
        group, = self.param_groups
        params, grads, buffers, shapes = [], [], [], {}
        self._init_group(group, params, grads, buffers)
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov's
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for p, update in zip(params, updates, strict=True):
            shapes.setdefault(p.shape, []).append((p, update))
        for (rows, columns), pairs in shapes.items():
            own, updates = zip(*pairs, strict=True)
            x = torch.stack(updates).to(torch.bfloat16 if self.bf16 else own[0].dtype)
            new, times = orthogonal(x, group).to(own[0].dtype), max(1, rows / columns) ** 0.5
            torch._foreach_add_(own, [*new], alpha=-group["lr"] * times)  # its "original"

def orthogonal(x: torch.Tensor, group: dict) -> torch.Tensor:
    """(n, rows, columns) -> nearly the closest matrices whose singular values are all 1."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT, group).mT  # smaller squares
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
    matrices = {name: p for name, p in trained.items()
                if cfg.optimizer == "muon" and p.dim() == 2 and name not in rows}
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

def use_bf16(device: str, wanted: bool) -> bool:  # a CPU without instructions for it would crawl
    return device == "cuda" or wanted and bool(torch.cpu.get_capabilities().get("avx512_bf16"))

@contextmanager
def autocast(device: str, bf16: bool):
    """A context for the forward: products in bf16, or as they are."""
    on = use_bf16(device, bf16)  # a CPU's fused attention is slow backward in it: spell it out
    spelled_out = sdpa_kernel(SDPBackend.MATH) if on and device == "cpu" else nullcontext()
    with torch.autocast(device, torch.bfloat16, enabled=on), spelled_out:
        yield

class WithCTC(torch.nn.Module):
    """Adds a gradient: the adapter's output, read by the LLM's head, shall spell a transcript (CTC,
    Graves et al. 2006): the LLM alone takes long to find out which sounds are which words."""
    def __init__(self, model):  # model.ctc: its weight
        super().__init__()
        self.model, self.ends = model, torch.tensor(model.ends)
        chat = model.tokenizer.apply_chat_template(TRANSCRIBE.messages()[:1], tokenize=False)
        start = chat.split(TRANSCRIBE.system)[0] + TRANSCRIBE.system  # context may follow
        self.start = torch.tensor(model.tokenizer(start).input_ids)
    def forward(self, input_ids, labels, num_items_in_batch, **inputs):
        heard = []  # (W, N, D)
        hook = self.model.adapter.register_forward_hook(lambda *args: heard.append(args[-1]))
        out = self.model(input_ids, labels=labels, num_items_in_batch=num_items_in_batch, **inputs)
        hook.remove()
        second = self.model.ctc / num_items_in_batch * self.ctc(heard[0], input_ids, labels)
        out.loss = out.loss + (second - second.detach())  # what is logged stays the LLM's
        return out
    def ctc(self, audio, input_ids, labels) -> torch.Tensor:
        """(W, N, D), (B, L) ids and labels -> the sum of the transcripts' CTC losses."""
        config = self.model.config
        windows = (input_ids == config.audio_token_id).sum(1) // config.tokens_per_window
        start = self.start[:input_ids.shape[1]].to(labels)
        own = (input_ids[:, :len(start)] == start).all(1).nonzero().flatten()
        if not len(own):
            return audio.sum() * 0
        audio = audio.split(windows.tolist())
        sounds = [audio[i].flatten(0, 1) for i in own]  # (N * windows, D) each
        texts = [row[(row >= 0) & ~torch.isin(row, self.ends.to(row))] for row in labels[own]]
        logits = self.model.llm.lm_head(torch.nn.utils.rnn.pad_sequence(sounds)).float()
        lengths = [torch.tensor([*map(len, some)]) for some in (sounds, texts)]
        return torch.nn.functional.ctc_loss(  # zero: of more tokens than places
            logits.log_softmax(-1), torch.cat(texts), *lengths, self.model.ends[1], "sum", True)
