"""Files of answers as rows of a batch."""

import json
import logging
from itertools import pairwise

import numpy as np
import pytest
import torch

from megarpt.config.schema import ChatConfig, SftConfig
from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.data.answers import AnswerDataset
from megarpt.data.batches import evaluation_batches
from megarpt.data.build import build_eval_sets, build_train_batches
from megarpt.data.chat import AnswerFormat
from megarpt.errors import ConfigError, DataError

S, EOD, CPU = 16, 256, torch.device("cpu")
PAIRS = [("ab", "cde"), ("f", "ghijklm"), ("nopqrstuvw", "xyz"), ("0", "1"), ("2345", "67")]


def write(path, pairs=PAIRS):
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    return str(path)


def opened(path, *, seq_length=S, **options):
    form = AnswerFormat(load_tokenizer("bytes"), ChatConfig())
    return AnswerDataset(str(path), form, seq_length=seq_length, **options)


def read(dataset, row):
    """(tokens, labels, loss_mask, edges) of a row."""
    s = dataset.seq_length
    tokens, labels, mask = np.full(s, -1), np.full(s, -1), np.zeros(s, np.bool_)
    starts = dataset.read_into(row, tokens, labels, mask, {})
    return tokens, labels, mask, [0, *starts.tolist(), s]


def configure(tmp_path, pairs=PAIRS, **data):
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"init_from": "start", "vocab_size": data.pop("vocab_size", None)},
        "data": {
            "tokenizer": "bytes",
            "train": [{"path": write(tmp_path / "a.jsonl", pairs), "weight": 3.0}, {"path": write(tmp_path / "b.jsonl")}],
            "valid": {"held": write(tmp_path / "held.jsonl", PAIRS[:3])},
            "seq_length": S,
        }
        | data,
        "batch": {"micro_batch_size": 2, "global_batch_size": 4},
        "train": {"train_tokens": 40 * S},
    }
    return SftConfig.model_validate(tree)


def build(cfg):
    return build_train_batches(cfg, load_tokenizer("bytes"), dp_rank=0, dp_size=1, device=CPU)


def test_a_row_of_two_records_by_hand(tmp_path):
    dataset = opened(write(tmp_path / "a.jsonl", [("ab", "cd"), ("e", "fgh")]), seq_length=10)
    assert dataset.num_windows == 1
    tokens, labels, mask, edges = read(dataset, 0)
    a, b, c, d, e, f, g, h = b"abcdefgh"
    assert tokens.tolist() == [a, b, c, d, e, f, g, h, 0, 0]
    assert labels.tolist() == [b, c, d, EOD, f, g, h, EOD, 0, 0]
    assert mask.tolist() == [False, True, True, True, True, True, True, True, False, False]
    assert edges == [0, 4, 8, 10]
    assert (dataset.num_records, dataset.num_tokens, dataset.num_answer_tokens) == (2, 8, 7)
    assert dataset.bytes_per_token == 5 / 7


@pytest.mark.parametrize("seed", range(5))
def test_packing_loses_and_doubles_nothing(tmp_path, seed):
    rng = np.random.default_rng(seed)
    pairs = [
        (
            "".join(map(chr, rng.integers(97, 123, rng.integers(1, 9)))),
            "".join(map(chr, rng.integers(65, 91, rng.integers(1, 8)))),
        )
        for _ in range(60)
    ]
    dataset = opened(write(tmp_path / "a.jsonl", pairs))
    found = []
    for row in range(dataset.num_windows):
        tokens, labels, mask, edges = read(dataset, row)
        for first, last in pairwise(edges):
            inputs, targets, trains = tokens[first:last].tolist(), labels[first:last].tolist(), mask[first:last].tolist()
            if not any(trains):
                assert set(inputs) == set(targets) == {0} and last == S
                continue
            assert inputs[1:] == targets[:-1] and targets[-1] == EOD
            size = trains.index(True) + 1
            assert all(trains[size - 1 :])
            whole = bytes(inputs).decode()
            found.append((whole[:size], whole[size:]))
    assert sorted(found) == sorted(pairs)
    assert dataset.num_answer_tokens == sum(len(completion) + 1 for _, completion in pairs)


def test_batches_keep_records_apart_and_prompts_out_of_the_loss(tmp_path):
    with build(configure(tmp_path)) as batches:
        for batch in (each for _ in range(5) for each in batches.next_step()):
            edges, positions = batch.cu_seqlens.tolist(), batch.position_ids.flatten()
            tokens, labels, mask = batch.tokens.flatten(), batch.labels.flatten(), batch.loss_mask.flatten()
            known = {p + c: (len(p), len(c)) for p, c in PAIRS}
            for first, last in pairwise(edges):
                assert positions[first:last].tolist() == list(range(last - first))
                text = bytes(tokens[first:last].tolist()).decode()
                if not mask[first:last].any():
                    assert text.strip("\0") == "" and not labels[first:last].any()
                    continue
                num_prompt, num_answer = known[text]
                expected = [False] * (num_prompt - 1) + [True] * (num_answer + 1)
                assert mask[first:last].tolist() == expected


def test_evaluation_reads_every_record_once(tmp_path):
    (dataset,) = build_eval_sets(configure(tmp_path), load_tokenizer("bytes")).values()
    batches = list(evaluation_batches(dataset, micro_batch_size=2, dp_rank=0, dp_size=1, device=CPU))
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == dataset.num_answer_tokens == 4 + 8 + 4


def test_the_blend_is_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="megarpt.data.build"), build(configure(tmp_path)) as batches:
        rows = batches.datasets[0].num_windows
        assert [batch.source_id.numel() for batch in batches.next_step()] == [2, 2]
    assert caplog.messages[0] == (
        f"answers {tmp_path / 'a.jsonl'}: 5 records of 34 tokens, 21 of them learned, in {rows} rows of 16, share 0.75, "
        f"{40 * 0.75 / rows:.3g} epochs in this run"
    )


def test_a_position_is_gone_on_from_and_only_with_the_same_answers(tmp_path):
    cfg = configure(tmp_path)
    with build(cfg) as batches:
        batches.next_step()
        state = json.loads(json.dumps(batches.state_dict()))
        expected = batches.next_step()
    with build(cfg) as batches:
        batches.load_state_dict(state)
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(batches.next_step(), expected, strict=True))
    changed = configure(tmp_path, [*PAIRS[:-1], ("2345", "68")])
    with build(changed) as batches, pytest.raises(DataError, match=r"data\.sources\[0\]\.answers_sha256: got"):
        batches.load_state_dict(state)


def test_the_fingerprint_is_of_the_content_alone(tmp_path):
    one, same = opened(write(tmp_path / "a.jsonl")), opened(write(tmp_path / "b.jsonl"))
    assert one.fingerprint() == same.fingerprint()
    other_mask = opened(write(tmp_path / "c.jsonl", [("abc", "de"), *PAIRS[1:]]))
    other_rows = opened(tmp_path / "a.jsonl", seq_length=S + 4)
    assert len({each.content_sha256 for each in (one, other_mask, other_rows)}) == 3


def test_a_record_may_fill_a_row_and_a_longer_one_is_refused(tmp_path):
    full = ("p" * 8, "c" * (S - 8))  # and the end, which is only a label
    tokens, labels, mask, edges = read(opened(write(tmp_path / "a.jsonl", [full])), 0)
    assert bytes(tokens.tolist()).decode() == "".join(full) and labels[-1] == EOD and mask.sum() == S - 7 and edges == [0, S]
    with pytest.raises(DataError, match=r"b\.jsonl:2: the record has 18 tokens, expected at most 17"):
        opened(write(tmp_path / "b.jsonl", [full, ("p" * 9, full[1])]))


def test_longer_records_are_left_out_and_counted(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", [*PAIRS, ("p", "c" * S), ("p" * S, "c")])
    with caplog.at_level(logging.WARNING, logger="megarpt.data.answers"):
        dataset = opened(path, leave_out_long=True)
    assert (dataset.num_records, dataset.num_left_out) == (5, 2)
    assert caplog.messages == [f"{path}: left out 2 of 7 records, which need more than 16 tokens"]
    assert dataset.fingerprint() == opened(write(tmp_path / "b.jsonl")).fingerprint()
    with pytest.raises(DataError, match=r"no record is left, since all 1 need more than 16 tokens"):
        opened(write(tmp_path / "c.jsonl", [("p", "c" * S)]), leave_out_long=True)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "this is no JSON"),
        (b"\xff", "this is no JSON"),
        (b"[1]", r"got \[1\], expected an object"),
        (b'{"text": "x"}', r"got the keys \['text'\], expected either prompt and completion, or messages"),
        (
            b'{"prompt": "x", "completion": "y", "messages": []}',
            r"got the keys .*, expected either prompt and completion, or messages",
        ),
        (b'{"completion": "y"}', r"prompt: missing, got the keys \['completion'\], expected a text that is not empty"),
        (b'{"prompt": "", "completion": "y"}', "prompt: got '', expected a text that is not empty"),
        (b'{"prompt": "x", "completion": 3}', "completion: got 3, expected a text"),
        (b'{"prompt": "x", "completion": "\\ud800"}', "completion: half of a surrogate pair at character 0"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "messages: the last one is of role 'user'"),
    ],
)
def test_wrong_lines_say_where_and_what(tmp_path, line, problem):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl:3: {problem}"):
        opened(path)


def test_files_that_hold_nothing(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: no record is left, since it has none"):
        opened(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"cannot read prompts with answers .*none\.jsonl: No such file"):
        opened(tmp_path / "none.jsonl")


def test_a_row_that_is_not_there(tmp_path):
    with pytest.raises(IndexError, match="row 99, expected 0 to"):
        read(opened(write(tmp_path / "a.jsonl")), 99)


def test_a_model_with_fewer_rows_than_ids_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.vocab_size: got 99, expected at least 257"):
        build(configure(tmp_path, vocab_size=99))


def test_what_is_left_out_follows_the_configuration(tmp_path):
    long = [*PAIRS, ("p", "c" * S)]
    with pytest.raises(DataError, match=r"a\.jsonl:6: .* or set data\.too_long=leave_out"):
        build(configure(tmp_path, long))
    with build(configure(tmp_path, long, too_long="leave_out")) as batches:
        assert batches.datasets[0].num_records == 5
