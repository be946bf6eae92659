"""Adapt a model in ONNX Runtime to lm-eval's model interface.

Import it only after ``require_lm_eval``: lm-eval is an optional package.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from stages.commands.progress import Progress
from stages.errors import UserError
from stages.evaluation.tasks.likelihood import Continuation, likelihoods
from stages.model.genai_config import end_tokens_of, read_genai_config
from stages.runtime.decoder import Decoder

_UNKNOWN_LENGTH = 2048
"""Tokens that lm-eval assumes where a model doesn't say how many it reads."""
_NEW_TOKENS = 256
"""lm-eval's default for tokens of an answer."""
_LOGITS_BYTES = 256 << 20
"""Memory for the logits of one batch; a single long request may take more."""
_FLOAT32 = 4


class OnnxRuntimeLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """Scores and continues text with a ``Decoder``; contexts, spaces and stop strings are treated as lm-eval does.

    Args:
        decoder: the opened model.
        tokenizer: the model's own.
        progress: shows how far each kind of request is.
    """

    def __init__(self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._decoder = decoder
        self._progress = progress

    @property
    def max_length(self) -> int:
        """Return how many tokens the model reads at most."""
        return self._decoder.feeds.window.length or self._decoder.directory.context_length or _UNKNOWN_LENGTH

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends texts."""
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """Return the token before a text without context: the one that begins texts, or else the one that ends them."""
        begin: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """Return the name under which lm-eval caches requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the text that the tokenizer's template makes of it."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Return token ids; the first token isn't added to text that already begins with it."""
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        tokens: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return tokens

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, greedy or not) of each (cache key, context, continuation)."""
        continuations = [Continuation(context=tuple(context), tokens=tuple(tokens)) for _, context, tokens in requests]
        for continuation in continuations:
            self._require_room(len(continuation.tokens))
        answers = [(0.0, False)] * len(requests)
        task = self._progress.add_task("log-likelihoods", total=len(requests), unit="requests")
        batch_tokens = max(1, _LOGITS_BYTES // _FLOAT32 // len(self.tokenizer))
        for index, found in likelihoods(continuations, self._decoder.logits, self.max_length, batch_tokens):
            answers[index] = found.log_probability, found.is_greedy
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
            self._progress.advance(task)
        self._progress.remove_task(task)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-likelihood of each whole text, in windows of ``max_length`` tokens; each token counts once."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            (text,) = request.args
            tokens = self.tok_encode(text)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += log_likelihood
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return greedy answers, each up to its first stop string, its end token, or its largest length.

        Raises:
            UserError: a task asks for sampling, or for more tokens than the model reads.
        """
        answers = []
        for request in self._progress.track(requests, description="answers", unit="requests"):
            context, settings = request.args
            answers.append(self._answer(context, settings))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _answer(self, context: str, settings: dict[str, Any]) -> str:
        wanted = normalize_gen_kwargs(settings, _NEW_TOKENS)
        if wanted.get("do_sample"):
            raise UserError(
                f"--lm_eval_tasks: a task asks for sampling ({json.dumps(settings)}), but answers here are greedy; "
                "set do_sample: false in its generation_kwargs."
            )
        limit = int(wanted["max_gen_toks"])
        self._require_room(limit + 1)
        stops = [stop for stop in handle_stop_sequences(wanted.get("until"), self.tokenizer.eos_token) if stop]
        tokens = self.tok_encode(context)[-(self.max_length - limit) :]
        return self._until_stopped(tokens, limit, stops)

    def _until_stopped(self, tokens: list[int], limit: int, stops: list[str]) -> str:
        text, new, ends = "", [], self._end_tokens()
        for token in self._decoder.continuation(tokens):
            if token in ends:
                break
            new.append(token)
            text = str(self.tokenizer.decode(new, skip_special_tokens=True))
            if len(new) == limit or any(stop in text for stop in stops):
                break
        return min((text.split(stop)[0] for stop in stops), key=len, default=text)

    def _end_tokens(self) -> set[int]:
        directory = self._decoder.directory
        content = read_genai_config(directory.folder) if directory.has_genai_config else {}
        return {self.eot_token_id, *end_tokens_of(content)}

    def _require_room(self, tokens: int) -> None:
        if tokens > self.max_length:
            raise UserError(
                f"--lm_eval_tasks: a task needs {tokens} tokens at once, but {self._decoder.directory.folder} reads at "
                f"most {self.max_length}; leave this task out."
            )
