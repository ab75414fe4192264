"""Ask a running engine that serves demo.gguf every question, greedily, and compare its answers with the text.

The engine is any server with /v1/chat/completions: llama-server alone, llama-server over RPC workers, or Ollama.
`--save` keeps all answers, `--same-as` compares them with those of an earlier run, answer by answer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from corpus import Corpus, Sampler, read_corpus
from tokenizer import Tokenizer, learn_merges
from train import MERGE_COUNT, SEED

Messages = list[dict[str, str]]
NOTABLE = (
    "Hello!",
    "Who are you?",
    "What can you do?",
    "How many layers do you have?",
    "What is model sharding?",
    "Why shard a model?",
    "What is a worker?",
    "What is an RPC worker?",
    "What is a coordinator?",
    "What is a layer plan?",
    "Show me a layer plan.",
    "What does memory_aware mean?",
    "Why are fewer workers faster?",
    "What is time to first token?",
    "What is the KV cache?",
    "What is GGUF?",
    "What is Ollama?",
    "What happens when a worker dies?",
    "How do I use sollol_nb?",
    "How do I see the cluster?",
    "How do I see the latency?",
    "Where will my model run?",
    "What is quantum computing?",
    "Explain quantum computing",
    "What is AGI?",
    "Complex task...",
    "Task for Researcher",
    "Task for Editor",
    "Task for Summarizer",
    "Say something with accents and symbols.",
    "Count from one to twenty.",
    "Describe a worker as JSON.",
    "List the steps of sharding a model.",
    "Show me an example cell.",
    "Say ok.",
    "Tell me everything about sharding.",
    "Tell me a long story about sharding.",
    "What is the capital of France?",
    "Write me a poem",
)
# Minimum shares of correct answers by kind of question. Trained questions must be answered exactly.
REQUIRED = {
    "trained": 1.0,
    "reworded": 0.95,
    "held out": 0.85,
    "out of scope": 0.93,
    "with system message": 0.97,
    "second turn": 0.97,
    "tenth turn": 0.95,
    "continued from a cut": 0.95,
}


@dataclass(frozen=True, slots=True)
class Case:
    """One request and the answer it should get."""

    kind: str
    messages: Messages
    expected: str

    @property
    def key(self) -> str:
        return json.dumps([self.kind, self.messages], ensure_ascii=False)


def _user(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


def cases(corpus: Corpus, sampler: Sampler) -> list[Case]:
    """Every trained question, and a fixed choice of every other kind."""
    rng = np.random.default_rng(7)
    exchanges, foreign = corpus.exchanges, corpus.out_of_scope
    found = [Case("trained", [_user(q)], e.answer) for e in exchanges for q in e.questions]
    found += [Case("held out", [_user(q)], e.answer) for e in exchanges for q in e.held_out]
    found += [Case("out of scope", [_user(q)], foreign.answer) for q in foreign.held_out]
    found += [Case("out of scope", [_user(foreign.question(rng))], foreign.answer) for _ in range(100)]
    short = [e for e in exchanges if not e.is_long]
    for exchange, before in zip(short, short[7:] + short[:7], strict=True):
        question = exchange.questions[0]
        found.append(Case("reworded", [_user(sampler.reworded(question))], exchange.answer))
        system_prompt = corpus.system_prompts[int(rng.integers(len(corpus.system_prompts)))]
        system = {"role": "system", "content": system_prompt}
        found.append(Case("with system message", [system, _user(question)], exchange.answer))
        history = [_user(before.questions[0]), {"role": "assistant", "content": before.answer}]
        found.append(Case("second turn", [*history, _user(question)], exchange.answer))
    for start in range(0, len(short) - 10, 5):
        chat: Messages = []
        for exchange in short[start : start + 9]:
            chat += [_user(exchange.questions[-1]), {"role": "assistant", "content": exchange.answer}]
        last = short[start + 9]
        found.append(Case("tenth turn", [*chat, _user(last.questions[0])], last.answer))
    return found


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def ask(base_url: str, model: str, messages: Messages) -> str:
    """The greedy answer of the engine."""
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 600}
    return str(_post(f"{base_url}/v1/chat/completions", body)["choices"][0]["message"]["content"])


def differing_tokens(base_url: str, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """The texts that llama-server's /tokenize splits differently from the training tokenizer."""

    def tokens(text: str) -> list[int]:
        answer = _post(f"{base_url}/tokenize", {"content": text, "add_special": True})
        return list(answer["tokens"])

    return [text for text in texts if tokens(text) != tokenizer.encode(text)]


def continued(base_url: str, corpus: Corpus, tokenizer: Tokenizer) -> list[tuple[Case, str]]:
    """Answers cut between two tokens and completed by llama-server's /completion from their text."""
    rng, results = np.random.default_rng(8), []
    for exchange in corpus.exchanges:
        question, answer = exchange.questions[0], exchange.answer
        whole = tokenizer.encode(answer)
        cuts = [
            at
            for at in range(1, len(answer))
            if tokenizer.encode(answer[:at]) + tokenizer.encode(answer[at:]) == whole
        ]
        if not cuts:
            continue
        cut = cuts[int(rng.integers(len(cuts)))]
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer[:cut]}"
        rest = _post(f"{base_url}/completion", {"prompt": prompt, "temperature": 0, "n_predict": 600})["content"]
        results.append((Case("continued from a cut", [_user(prompt)], answer), answer[:cut] + str(rest)))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base_url", help="for example http://127.0.0.1:8080")
    parser.add_argument("--model", default="demo", help="the model's name at the engine; only Ollama uses it")
    parser.add_argument("--ollama", action="store_true", help="skip the checks that only llama-server supports")
    parser.add_argument("--save", type=Path, help="write all answers to this JSON file")
    parser.add_argument("--same-as", type=Path, help="compare with answers saved earlier")
    parser.add_argument("--expected", type=Path, help="write the notable answers to this JSON file")
    parser.add_argument("--every", type=int, default=1, help="ask only every n-th question")
    options = parser.parse_args()

    corpus = read_corpus()
    tokenizer = Tokenizer(learn_merges(corpus.texts(SEED), MERGE_COUNT))
    chosen = cases(corpus, Sampler(corpus, tokenizer, seed=99))[:: options.every]
    results = [(case, ask(options.base_url, options.model, case.messages)) for case in chosen]
    failed = False
    if not options.ollama:
        results += continued(options.base_url, corpus, tokenizer)
        texts = [text for e in corpus.exchanges for text in (*e.questions, e.answer)] + list(corpus.system_prompts)
        for text in differing_tokens(options.base_url, tokenizer, texts):
            print(f"tokenized differently: {text!r}")
            failed = True

    for kind, group in itertools.groupby(sorted(results, key=lambda r: r[0].kind), key=lambda r: r[0].kind):
        answers = list(group)
        wrong = [(case, got) for case, got in answers if got != case.expected]
        right = len(answers) - len(wrong)
        print(f"{kind}: {right}/{len(answers)}")
        for case, got in wrong:
            print(f"  {case.messages[-1]['content'][-90:]!r} -> {got[:160]!r}")
        failed |= right < REQUIRED[kind] * len(answers)

    given = {case.key: got for case, got in results}
    if options.save:
        options.save.write_text(json.dumps(given, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if options.expected:
        answers_by_question = {q: ask(options.base_url, options.model, [_user(q)]) for q in NOTABLE}
        options.expected.write_text(
            json.dumps(answers_by_question, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
        )
    if options.same_as:
        earlier = json.loads(options.same_as.read_text(encoding="utf-8"))
        differing = [key for key, got in given.items() if earlier.get(key) != got]
        print(f"same as {options.same_as.name}: {len(given) - len(differing)}/{len(given)}")
        for key in differing:
            print(f"  {key[-160:]}\n    was {earlier.get(key)!r}\n    is  {given[key]!r}")
        failed |= bool(differing)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
