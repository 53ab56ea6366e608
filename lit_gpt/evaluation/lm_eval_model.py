"""A GPT behind the interface of lm-eval (EleutherAI's lm-evaluation-harness), with the figures of its own `hf` model.

Texts are encoded, cut and stopped as that model does it; see `Harness`. What is computed differs: requests are packed
into rows without padding, and probabilities are float32 whatever the weights are.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window, make_table
from tqdm import tqdm

from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.checkpoints.folder import check_checkpoint_dir
from lit_gpt.cli import flag_values
from lit_gpt.data import dataset, packing
from lit_gpt.errors import UsageError, UserError
from lit_gpt.evaluation.args import HarnessArgs
from lit_gpt.files import atomic, read_json
from lit_gpt.generation.engine import decode, new_generator
from lit_gpt.generation.sampling import Sampling
from lit_gpt.generation.sequence import DecodingRow
from lit_gpt.generation.steps import FastStep
from lit_gpt.hardware import DTYPES, choose_device
from lit_gpt.methods.finetuned_model import build_finetuned
from lit_gpt.model.gpt import GPT
from lit_gpt.text.messages import Message
from lit_gpt.text.prompt_style import PromptStyle, as_list, generation_stop_ids
from lit_gpt.text.tokenizer import Tokenizer, find_tokenizer, read_settings

SAMPLING = {"do_sample", "temperature", "top_k", "top_p"}  # what a task may ask of generation, besides where to stop


def evaluate(args: HarnessArgs) -> None:
    """Evaluate what the flags of eval/lm_eval_harness.py name; print a table and write `--out`."""
    if args.out.exists():
        raise UserError(f"--out {args.out}: exists already; choose another or remove it")
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise UsageError("--tasks: expected the name of a task, or several with commas between, such as hellaswag")
    check_checkpoint_dir(args.checkpoint_dir)
    manager, tasks = load_tasks(names, args.include_path)
    harness = load_harness(args)
    results = simple_evaluate(
        harness, tasks=tasks, task_manager=manager, num_fewshot=args.num_fewshot, limit=args.limit,
        log_samples=args.log_samples, apply_chat_template=args.apply_chat_template, random_seed=args.seed,
        numpy_random_seed=args.seed, torch_random_seed=args.seed, fewshot_random_seed=args.seed,
    )  # fmt: skip
    results["hyperparameters"] = flag_values(args)
    results["requests_cut"] = harness.cut
    with atomic(args.out) as temporary:
        temporary.write_text(json.dumps(results, indent=2, default=handle_non_serializable) + "\n", encoding="utf-8")
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if harness.cut:
        print(f"{harness.cut} requests were longer than {harness.max_length} tokens and lost their beginning")
    print(f"wrote {args.out}")


def load_harness(args: HarnessArgs) -> "Harness":
    base, place = BaseCheckpoint.open(args.checkpoint_dir), (DTYPES[args.precision], choose_device(args.device))
    tokenizer = base.tokenizer  # before the model takes its time
    if args.finetuned_path:
        model, record = build_finetuned(base, args.finetuned_path, None, *place)
        style = PromptStyle.from_dict(record["prompt_style"])
    else:
        model, style = base.build(*place), base.prompt_style
    block_size = model.config.block_size
    if args.max_seq_length and args.max_seq_length > block_size:
        raise UsageError(f"--max_seq_length {args.max_seq_length}: the model takes {block_size}")
    length, generator = args.max_seq_length or block_size, new_generator(model, args.seed)
    return Harness(model, tokenizer, style, args.apply_chat_template, length, args.batch_tokens, generator)


class Harness(TemplateLM):
    """Answers lm-eval's requests.

    A text gets the BOS that the tokenizer puts there and no second one; an empty context is BOS, or EOS where the
    tokenizer names no BOS. What is too long loses its beginning. Generation ends at a stop string of the task, which
    is cut off, at EOS, or at an end token of the checkpoint.

    Args:
        style: how messages are rendered if lm-eval applies a chat template.
        chat: whether it does. The end tokens of `style` then end an answer too.
        max_length: tokens that a request may have; the rest of its beginning is cut off.
        batch_tokens: tokens computed together. A longer request is computed alone.
        generator: of the sampling, for tasks that sample; on the model's device.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        style: PromptStyle,
        chat: bool,
        max_length: int,
        batch_tokens: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.model, self.tok, self.style, self.chat = model, tokenizer, style, chat
        self.max_length = min(max_length, model.config.block_size - len(model.virtual_tokens))
        self.batch_tokens, self.generator = batch_tokens, generator
        self.cut = 0  # requests that lost their beginning
        # a template that writes its own BOS, or none, is the whole prompt
        self.bos = False if chat and style.template_writes_bos else None
        self.stop_ids = {tokenizer.eos_id, *end_tokens(tokenizer.checkpoint_dir), *(style.stop_ids if chat else ())}

    # what lm-eval asks of its models

    @property
    def eot_token_id(self) -> int | None:
        return self.tok.eos_id

    @property
    def prefix_token_id(self) -> int:
        folder = self.tok.checkpoint_dir
        named = find_tokenizer(folder).suffix == ".model" or read_settings(folder).get("bos_token")
        token = self.tok.bos_id if named and self.tok.bos_id is not None else self.tok.eos_id
        if token is None:
            raise UserError(f"{folder}/tokenizer_config.json: names neither bos_token nor eos_token; one is needed")
        return token

    @property
    def tokenizer_name(self) -> str:
        return str(self.tok.checkpoint_dir).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.style.template if chat_template else None

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """Return a conversation's text; without a prompt for an answer, its last message is a beginning to continue."""
        text = self.style.render(chat_history, self.tok, answer=add_generation_prompt)
        if add_generation_prompt:
            return text
        beginning = chat_history[-1]["content"].strip()
        return text[: text.rindex(beginning) + len(beginning)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.tok.encode(string, bos=False if add_special_tokens is False else self.bos).tolist()

    # log-probabilities

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability, and whether it is the greedy one.

        Args:
            requests: the texts, and the tokens of context and continuation.
        """
        own = [self.sample(context, continuation) for _, context, continuation in requests]
        samples = [dataset.with_tokens_before(sample, self.model.virtual_tokens) for sample in own]
        lengths = [len(sample.tokens) - 1 for sample in samples]
        scores: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(samples)), key=lengths.__getitem__, reverse=True)
        bar = tqdm(total=len(order), desc="log-probabilities", unit="request", disable=disable_tqdm or None)
        for indices in packing.micro_batches(order, lengths, None, self.batch_tokens):
            row = packing.pack(samples[i] for i in indices).to(self.model.wte.weight.device)
            log_p, greedy = self.model.score(row.idx, row.segments, row.targets)
            counts = [len(requests[i][2]) for i in indices]
            for i, p, hit in zip(indices, log_p.double().split(counts), greedy.split(counts), strict=True):
                scores[i] = p.sum().item(), bool(hit.all())
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], scores[i])
            bar.update(len(indices))
        bar.close()
        return [scores[i] for i in range(len(requests))]

    def sample(self, context: list[int], continuation: list[int]) -> dataset.Sample:
        """Return context and continuation, which is supervised, as a sample; of too many tokens the last."""
        if len(continuation) > self.max_length:
            raise UserError(
                f"a task has a continuation of {len(continuation)} tokens, more than --max_seq_length {self.max_length}"
            )
        self.cut += len(context) + len(continuation) > self.max_length + 1
        tokens = torch.tensor((context + continuation)[-self.max_length - 1 :], dtype=torch.int32)
        supervised = torch.zeros(len(tokens), dtype=torch.uint8)
        supervised[-len(continuation) :] = 1
        return dataset.Sample(tokens, supervised)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text, given BOS.

        A long text is read in windows that do not overlap in what they predict.
        """
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += log_p
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return an answer to each request. Those with the same options are answered together."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        answers: dict[int, str] = {}
        bar = tqdm(total=len(requests), desc="answers", unit="request", disable=disable_tqdm or None)
        for group in groups.values():
            for index, text in self.answer([requests[i].args[0] for i in group], requests[group[0]].args[1]):
                answers[group[index]] = text
                self.cache_hook.add_partial("generate_until", requests[group[index]].args, text)
                bar.update()
        bar.close()
        return [answers[i] for i in range(len(requests))]

    def prompt(self, text: str, room: int) -> list[int]:
        """Return the text's last tokens, as many as leave `room` for the answer."""
        if room >= self.max_length:
            raise UserError(
                f"a task asks for {room} new tokens, and --max_seq_length {self.max_length} leaves no prompt"
            )
        tokens = self.tok_encode(text)
        self.cut += len(tokens) > self.max_length - room
        return [*self.model.virtual_tokens, *tokens[room - self.max_length :]]

    def answer(self, texts: list[str], options: dict[str, Any]) -> Iterator[tuple[int, str]]:
        """Yield the index of each text and its answer, as they are ready."""
        options = normalize_gen_kwargs(options, DEFAULT_MAX_GEN_TOKS)
        room, sampling = options.pop("max_gen_toks"), self.sampling(options)
        stops = handle_stop_sequences(list(options["until"]), self.tok.eos_token)
        complete, prompts = self.completion(stops), [self.prompt(text, room) for text in texts]
        rows = {
            DecodingRow(list(prompt), room, self.generator, sampling=sampling): i for i, prompt in enumerate(prompts)
        }
        length = max(map(len, prompts)) + room
        cache = self.model.kv_cache(max(1, min(len(rows), self.batch_tokens // length)), length)
        longest_first = sorted(rows, key=lambda row: len(row.ids), reverse=True)
        for row, _ in decode(self.model, longest_first, cache, step=FastStep(self.model)):
            answer = row.ids[len(prompts[rows[row]]) :]
            row.remaining = 0 if complete(answer) else row.remaining
            if not row.remaining:
                yield rows[row], postprocess_generated_text(self.tok.decode(answer), stops, None)

    def completion(self, stops: list[str]) -> Callable[[list[int]], bool]:
        """Return what tells whether an answer's newest tokens hold a stop string, or the last is an end token."""
        # a stop string may be spelt with more tokens than the tokenizer would take
        span = 2 + max(len(self.tok.encode(stop, bos=False)) for stop in stops)

        def complete(answer: list[int]) -> bool:
            newest = self.tok.decode(answer[-span:], skip_special_tokens=False)
            return answer[-1] in self.stop_ids or any(stop in newest for stop in stops)

        return complete

    def sampling(self, options: dict[str, Any]) -> Sampling:
        """Return how a task wants its answers sampled. Raises UserError if it asks for what is not known."""
        unknown = sorted(options.keys() - SAMPLING - {"until"})
        if unknown:
            raise UserError(
                f"a task asks to generate with {', '.join(unknown)}; known here are {', '.join(sorted(SAMPLING))}"
            )
        temperature = options["temperature"] if options.get("do_sample") else 0.0
        return Sampling(temperature, options.get("top_k") or None, options.get("top_p") or 1.0)


def end_tokens(checkpoint_dir: Path) -> list[int]:
    """Return the ids at which transformers ends an answer."""
    if (checkpoint_dir / "generation_config.json").is_file():
        return generation_stop_ids(checkpoint_dir)
    return as_list(read_json(checkpoint_dir / "config.json", missing_ok=True).get("eos_token_id"))


def load_tasks(names: list[str], include_path: Path | None) -> tuple[TaskManager, list[Any]]:
    """Load the tasks and groups of these names, with their data.

    Raises:
        UserError: no such task, or its data cannot be had.
    """
    manager = task_manager(names, include_path)
    tasks: list[Any] = []
    for name in names:
        if name not in known_tasks(manager):
            raise UserError(f"--tasks {name}: lm-eval knows no such task; `lm-eval ls tasks` lists them")
        try:
            loaded = manager.load([name])
        except Exception as error:  # so may a download
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise UserError(f"--tasks {name}: cannot be loaded: {type(error).__name__}: {reason}") from None
        tasks += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
    return manager, tasks


def task_manager(names: list[str], include_path: Path | None) -> TaskManager:
    """Return lm-eval's index of the tasks in `include_path`, and of its own, which takes seconds, if those don't do."""
    if include_path is None:
        return TaskManager()
    if not include_path.is_dir():
        raise UserError(f"--include_path {include_path}: no such folder; expected one with tasks as YAML files")
    own = TaskManager(include_path=str(include_path), include_defaults=False)
    return own if known_tasks(own).issuperset(names) else TaskManager(include_path=str(include_path))


def known_tasks(manager: TaskManager) -> set[str]:
    return {*manager.all_tasks, *manager.all_groups, *manager.all_tags}
