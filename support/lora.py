"""support/lora.py -- what trains: LoRA into the LLM and out again, dtypes, a checkpoint's data."""
import torch

def prepare(model: torch.nn.Module, trained: str, lora: dict | None = None) -> torch.nn.Module:
    """Freeze all but what trains, and make that fp32: "adapter"; "lora", it, matrices beside the
    LLM's linears, our tokens' embeddings; "full", adapter and LLM. lora: rank, alpha, dropout."""
    model.config.trained, model.config.lora = trained, lora
    model.freeze("encoder", *(["llm"] if trained == "adapter" else []))
    if trained == "lora":
        add_matrices(model.llm, **lora)
        add_rows(model)
    for p in stored(model).values():
        p.data = p.data.float()
    return model

def add_matrices(llm: torch.nn.Module, rank: int, alpha: float, dropout: float) -> None:
    """W x -> W x + alpha / rank * B A x, with W frozen and B zero at first."""
    import peft
    peft.inject_adapter_in_model(peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear"), llm)
    for module in llm.modules():  # autocast casts; peft's cast would keep two more copies of x
        module.cast_input_dtype_enabled = False

def add_rows(model: torch.nn.Module) -> None:
    """Let the embeddings of our tokens train, on the way in and, in a tied LLM, on the way out.
    Not by peft's trainable_token_indices: that copies the whole table in every forward."""
    tokens = new_tokens(model.config)
    table, head = model.llm.get_input_embeddings(), model.llm.get_output_embeddings()
    model.new_rows = torch.nn.Parameter(table.weight[tokens].detach())
    def way_in(module, args, embeds):  # (B, L) ids -> (B, L, D)
        for token, row in zip(tokens, model.new_rows, strict=True):
            embeds = torch.where((args[0] == token)[..., None], row.to(embeds.dtype), embeds)
        return embeds
    def way_out(module, args, logits):  # (..., D) -> (..., V)
        own = torch.nn.functional.linear(args[0], model.new_rows).to(logits.dtype)
        for i, token in enumerate(tokens):  # all at once, their ids would be copied to the GPU
            logits[..., token] = own[..., i]
        return logits
    model.row_hooks = [table.register_forward_hook(way_in)]
    if model.config.tie_word_embeddings:
        model.row_hooks.append(head.register_forward_hook(way_out))

def new_tokens(config) -> list[int]:  # that have an embedding; the original's AUDIO has none
    ids = {config.audio_token_id, config.audio_start_id, config.audio_end_id}
    return sorted(i for i in ids if i < config.llm_config.vocab_size)

@torch.no_grad()
def merge(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Undo prepare(): what was learned goes into the weights, each rounded to dtype once."""
    if model.config.trained == "lora":
        for name, module in list(model.llm.named_modules()):
            if hasattr(module, "lora_A"):  # the base with matrices -> the base
                base = module.get_base_layer()
                base.weight += module.get_delta_weight("default").float()
                model.llm.set_submodule(name, base)
        table = model.llm.get_input_embeddings().weight
        table[new_tokens(model.config)] = model.new_rows.to(table.dtype)
        for hook in model.row_hooks:
            hook.remove()
        del model.llm.peft_config, model.new_rows, model.row_hooks
    model.config.trained = model.config.lora = model.config.base = None
    return cast(model, dtype).requires_grad_(True).freeze("encoder")

def cast(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Weights to dtype, not rotary frequencies as in model.to(dtype): that is off by radians."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model

def stored(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint holds: what trains, or all of a model without a base. A tied head: once."""
    whole = not model.config.trained
    return {name: p for name, p in model.named_parameters() if whole or p.requires_grad}
