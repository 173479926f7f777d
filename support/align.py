"""support/align.py -- CTC beside the LLM's loss, for models from nothing: where in the sound?"""
import torch
from torch import nn
from torch.nn.functional import ctc_loss
from torch.nn.utils.rnn import pad_sequence
from data import Sample
from model import AUDIO

class WithCTC(nn.Module):
    """A model whose loss gets a second gradient, from transcripts: the adapter's output, read by
    the LLM's own head, shall spell the answer (CTC: Graves et al. 2006). For the LLM alone it takes
    long to find out which sounds are which words. model.ctc: its weight; nothing of it is saved."""
    def __init__(self, model):
        super().__init__()
        self.model, self.blank, self.ends = model, model.ends[1], torch.tensor(model.ends)
        chat = model.tokenizer.apply_chat_template(Sample("", [b""]).messages()[:2], tokenize=False)
        self.start = torch.tensor(model.tokenizer(chat.split(AUDIO)[0]).input_ids)  # of transcripts
        def remember(adapter, args, audio):  # (W, N, D)
            self.audio = audio
        model.adapter.register_forward_hook(remember)

    def forward(self, input_ids, labels, num_items_in_batch, **inputs):
        out = self.model(input_ids, labels=labels, num_items_in_batch=num_items_in_batch, **inputs)
        second = self.model.ctc / num_items_in_batch * self.ctc(input_ids, labels)
        out.loss = out.loss + (second - second.detach())  # what is logged stays the LLM's
        return out

    def ctc(self, input_ids, labels) -> torch.Tensor:
        """(B, L) ids and labels -> the sum of the transcripts' CTC losses."""
        config = self.model.config
        windows = (input_ids == config.audio_token_id).sum(1) // config.tokens_per_window
        audio = self.audio.split(windows.tolist())
        start = self.start[:input_ids.shape[1]].to(labels)
        own = (input_ids[:, :len(start)] == start).all(1).nonzero().flatten()
        if not len(own):
            return self.audio.sum() * 0
        sounds = [audio[i].flatten(0, 1) for i in own]  # (N * windows, D) each
        texts = [row[(row >= 0) & ~torch.isin(row, self.ends.to(row))] for row in labels[own]]
        logits = self.model.llm.lm_head(pad_sequence(sounds)).float()  # (T, rows, V)
        lengths = [torch.tensor([*map(len, some)]) for some in (sounds, texts)]
        return ctc_loss(logits.log_softmax(-1), torch.cat(texts), *lengths, self.blank, "sum",
                        zero_infinity=True)  # of more tokens than places
