"""Forgetting: afterwards the bank is, bit for bit, one that never saw the text, and no byte of it is on the disk."""

from __future__ import annotations

import dataclasses
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from conftest import TINY_TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import assert_same, files_of, largest_file, make_entry, make_index, readable, segment_files

from longmem.bank import BankEntry, DrawnOn, MemoryBank
from longmem.config import EncodeConfig, Precision
from longmem.errors import (
    BankMismatchError,
    BankNotFoundError,
    ConfigError,
    SourceError,
    StoreCorruptError,
    StoreNotWritableError,
)
from longmem.local_window import remember_tokens
from longmem.model import LongMem
from longmem.store import MemoryStore, Stretch
from longmem.store.traces import needles, traces

SECRET = "My sister Zoë hides the key of the boathouse under the third stone. "


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LongMem:
    return LongMem.from_pretrained(str(tiny_model_dir), device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "memories"


def write(bank: MemoryBank, model: LongMem, pieces: list[tuple[str, str]]) -> MemoryBank:
    for source, text in pieces:
        if text:
            model.write_text(bank, text, source=source, append=True)
    return bank


def logits(model: LongMem, bank: MemoryBank) -> torch.Tensor:
    ids = model.tokenizer("Where is the key of the boathouse?", add_special_tokens=False).input_ids
    return model.forward(torch.tensor([ids]), bank).logits_BTV


# ---- parts of a source -------------------------------------------------------------------------------------


def test_a_part_of_a_text_is_forgotten(folder: Path, model: LongMem) -> None:
    text = TINY_TEXT + SECRET + TINY_TEXT
    start = len(TINY_TEXT)
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes", model.bank_spec)
        write(bank, model, [("a", "Something else. "), ("diary", text), ("b", "The harbour is quiet. ")])
        never = write(model.new_bank(), model, [("a", "Something else. "), ("diary", TINY_TEXT * 2)])
        write(never, model, [("b", "The harbour is quiet. ")])
        assert not torch.equal(logits(model, bank), logits(model, never))
        stretch = Stretch("diary", start, start + len(SECRET))
        preview = store.preview_forget("notes", [stretch])
        assert [span.text for span in preview.text] == [SECRET] and preview.whole == () and preview.generated == ()
        assert preview.banks == ("notes",) and 0 < preview.tokens < preview.encode
        encoded: list[int] = []
        receipt = store.forget("notes", [stretch], model, on_tokens=encoded.append)
        bank.refresh()
        for one in (bank, store.bank("notes")):
            assert_same(one, never)
            assert torch.equal(logits(model, one), logits(model, never))
        assert receipt.facts["banks"][0]["encoded_again"] == sum(encoded) == len(never.tokens_of("diary"))
        assert receipt.is_about("diary") and not receipt.is_about("a")
        assert store.verify().ok and store.receipts("notes") == [receipt] and store.is_genuine(receipt)
        # And it can be written to again.
        write(bank, model, [("diary", "More.")])
        assert_same(store.bank("notes"), write(never, model, [("diary", "More.")]))


def test_what_is_left_is_encoded_in_the_windows_of_the_bank(folder: Path, model: LongMem) -> None:
    spec = dataclasses.replace(model.bank_spec, encode=EncodeConfig(17, 3))
    assert spec.encode != model.config.encode
    with MemoryStore.open(folder) as store:
        bank = write(store.bank("notes", spec), model, [("diary", TINY_TEXT + SECRET + TINY_TEXT)])
        plain = write(model.new_bank(), model, [("diary", TINY_TEXT + SECRET + TINY_TEXT)])
        assert not torch.equal(bank.keys_HNE, plain.keys_HNE)
        store.forget("notes", [Stretch("diary", len(TINY_TEXT), len(TINY_TEXT) + len(SECRET))], model)
    with MemoryStore.open(folder) as store:
        again = store.bank("notes", model.bank_spec)  # the windows are the bank's own, whoever opens it
        assert again.spec.encode == spec.encode
        never = write(MemoryBank(spec), model, [("diary", TINY_TEXT * 2)])
        assert_same(again, never)
        offsets_N2 = torch.stack((torch.arange(30), torch.arange(1, 31)), dim=1)
        for bank in (again, never):
            remember_tokens(model, bank, torch.arange(30, 60), "x" * 30, offsets_N2, source="chat")
        assert_same(again, never)
        # A repair makes the same, too.
        keys_HNE = again.keys_HNE.clone()
        file = min((folder / "segments").iterdir())
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        store.repair(model)
        assert torch.equal(store.bank("notes").keys_HNE, keys_HNE)


@settings(max_examples=30)
@given(
    pieces=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 30)), min_size=1, max_size=5),
    spans=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 25)), min_size=1, max_size=2),
    consolidated=st.booleans(),
)
def test_any_stretches_of_any_pieces(
    model: LongMem, pieces: list[tuple[str, int]], spans: list[tuple[int, int]], consolidated: bool
) -> None:
    """As if each append had been made without the characters that were forgotten."""
    written = [(source, TINY_TEXT[7 * n : 7 * n + size] + "ü") for n, (source, size) in enumerate(pieces)]
    ours = pieces[0][0]
    length = sum(len(text) for source, text in written if source == ours)
    stretches = [Stretch(ours, start % length, min(start % length + size, length)) for start, size in spans]
    gone = {place for stretch in stretches for place in range(stretch.start, stretch.end or 0)}
    expected, place = [], 0
    for source, text in written:
        if source == ours:
            kept = "".join(char for n, char in enumerate(text, start=place) if n not in gone)
            place += len(text)
            expected.append((source, kept))
        else:
            expected.append((source, text))
    with tempfile.TemporaryDirectory() as name, MemoryStore.open(name) as store:
        bank = write(store.bank("notes", model.bank_spec), model, written)
        if consolidated:
            store.consolidate("notes")
        store.forget("notes", stretches, model)
        never = write(model.new_bank(), model, expected)
        assert_same(store.bank("notes"), never)
        bank.refresh()
        assert_same(bank, never)
        assert store.verify().ok


def test_tokens_that_the_model_chose_stay_as_they_are(folder: Path, model: LongMem) -> None:
    """A conversation: special tokens without characters, and ids that its text alone does not give."""
    end = model.tokenizer.eos_token_id
    words = ["Hello", " there", ". The key is", " under", " it", ". Bye"]
    ids: list[int] = []
    offsets: list[list[int]] = []
    text = ""
    for word in words:
        found = model.tokenizer(word, add_special_tokens=False, return_offsets_mapping=True)
        ids += found.input_ids
        offsets += [[a + len(text), b + len(text)] for a, b in found.offset_mapping]
        text += word
        ids.append(end)
        offsets.append([len(text), len(text)])
    ids_N = torch.tensor(ids)
    entry = BankEntry("chat", text, 0, ids_N, torch.tensor(offsets), *model.encode(ids_N))
    first, last = text.index("e key"), text.index("der it")
    with MemoryStore.open(folder) as store:
        store.bank("notes", model.bank_spec).append(entry)
        store.forget("notes", [Stretch("chat", first, last)], model)
        bank = store.bank("notes")
        assert bank.text_of("chat") == text[:first] + text[last:]
        kept = [n for n, (a, b) in enumerate(offsets) if b <= first or a >= last]
        ours = bank.tokens_of("chat").tolist()
        # Whole tokens of what stays, special ones too; between them what is left of those that were cut.
        before, after = (
            [ids[n] for n in kept if offsets[n][1] <= first],
            [ids[n] for n in kept if offsets[n][0] >= last],
        )
        assert ours[: len(before)] == before and ours[-len(after) :] == after
        assert end in before and end in after
        keys_HNE, values_HNE = model.encode(bank.tokens_of("chat"))
        assert torch.equal(bank.keys_HNE, keys_HNE) and torch.equal(bank.values_HNE, values_HNE)
        assert store.verify().ok


def test_all_parts_are_the_whole(folder: Path, model: LongMem) -> None:
    with MemoryStore.open(folder) as store:
        write(store.bank("notes", model.bank_spec), model, [("a", SECRET), ("b", "Kept. ")])
        half = len(SECRET) // 2
        stretches = [Stretch("a", half), Stretch("a", 0, half)]
        assert store.preview_forget("notes", stretches).whole == ("a",)
        store.forget("notes", stretches)  # needs no model
        assert store.bank("notes").sources == ("b",)


def test_what_was_written_in_a_time_is_forgotten(folder: Path, model: LongMem) -> None:
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes", model.bank_spec)
        write(bank, model, [("a", "Early. "), ("b", "Early too. ")])
        middle = datetime.now(UTC)
        write(bank, model, [("a", SECRET), ("c", "New.")])
        later = datetime.now(UTC)
        write(bank, model, [("a", "Late. ")])
        assert store.written("notes", after=later + timedelta(days=1)) == []
        assert store.written("notes", before=middle) == [Stretch("a", 0, 7), Stretch("b", 0, 11)]
        between = store.written("notes", after=middle, before=later)
        assert between == [Stretch("a", 7, 7 + len(SECRET)), Stretch("c", 0, 4)]
        store.forget("notes", between, model)
        assert_same(
            store.bank("notes"),
            write(model.new_bank(), model, [("a", "Early. "), ("b", "Early too. "), ("a", "Late. ")]),
        )
        with pytest.raises(BankNotFoundError):
            store.written("other")


def test_stretches_that_are_not_there(folder: Path, model: LongMem) -> None:
    with MemoryStore.open(folder) as store:
        bank = write(store.bank("notes", model.bank_spec), model, [("a", "Some text.")])
        before = files_of(folder)
        for stretch, message in (
            (Stretch("z"), "No source 'z' to forget. Bank 'notes' remembers: a"),
            (Stretch("a", 3, 3), "characters 0 to 10"),
            (Stretch("a", 0, 11), "characters 0 to 10"),
            (Stretch("a", -1, 4), "characters 0 to 10"),
        ):
            for attempt in (store.preview_forget, store.forget):
                with pytest.raises(SourceError, match=message):
                    attempt("notes", [stretch])
        with pytest.raises(ConfigError, match="give the model that wrote the bank"):
            store.forget("notes", [Stretch("a", 0, 4)])
        assert files_of(folder) == before and bank.text_of("a") == "Some text." and store.receipts() == []


def test_another_model_cannot_encode_what_is_left(folder: Path, model: LongMem, other_tiny_model_dir: Path) -> None:
    other = LongMem.from_pretrained(str(other_tiny_model_dir), device="cpu")
    with MemoryStore.open(folder) as store:
        write(store.bank("notes", model.bank_spec), model, [("a", "Some text.")])
        with pytest.raises(BankMismatchError, match="forget whole sources"):
            store.forget("notes", [Stretch("a", 0, 4)], other)
        store.forget("notes", [Stretch("a")], other)


def test_a_full_disk_and_a_damaged_neighbour_forget_nothing(folder: Path, model: LongMem) -> None:
    with MemoryStore.open(folder) as store:
        bank = write(store.bank("notes", model.bank_spec), model, [("a", "Some text. "), ("b", "Other text. ")])
        store.consolidate("notes")
        before = {name: (folder / name).read_bytes() for name in files_of(folder) if "segments" in name}
        for stretch in (Stretch("a"), Stretch("a", 0, 4)):
            with largest_file(100), pytest.raises(StoreNotWritableError, match="Nothing was forgotten"):
                store.forget("notes", [stretch], model)
        assert {name: (folder / name).read_bytes() for name in files_of(folder) if "segments" in name} == before
        assert_same(store.bank("notes"), bank)
        (path,) = segment_files(folder)
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes(data)
        with pytest.raises(StoreCorruptError, match="longmem repair"):
            store.forget("notes", [Stretch("a")], model)
        assert store.receipts() == []
        store.repair(model)
        store.forget("notes", [Stretch("a")], model)
        assert store.bank("notes").sources == ("b",)


# ---- bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("consolidated", [False, True])
def test_no_byte_is_left(folder: Path, model: LongMem, part: bool, consolidated: bool) -> None:
    with MemoryStore.open(folder) as store, MemoryStore.open(folder.with_name("never")) as other:
        bank = store.bank("notes", model.bank_spec)
        write(bank, model, [("a", TINY_TEXT)])
        before = len(bank)
        write(bank, model, [("boathouse", SECRET + "The end.")])
        bank.save_index(model.make_index(bank) if len(bank) > 400 else make_any_index(bank))
        if consolidated:
            store.consolidate("notes")
        entry = BankEntry(
            "boathouse",
            SECRET,
            0,
            bank.token_ids_N[before:-3],
            bank.offsets_N2[before:-3],
            bank.keys_HNE[:, before:],
            bank.values_HNE[:, before:],
        )
        sought = needles(entry)
        assert {sought[needle] for needle in traces(folder, sought)} == {"text", "token ids", "keys", "values"}
        if part:
            store.forget("notes", [Stretch("boathouse", 0, len(SECRET))], model)
            write(other.bank("notes", model.bank_spec), model, [("a", TINY_TEXT), ("boathouse", "The end.")])
        else:
            store.forget("notes", [Stretch("boathouse")])
            write(other.bank("notes", model.bank_spec), model, [("a", TINY_TEXT)])
            assert b"boathouse" not in b"".join((folder / name).read_bytes() for name in files_of(folder))
        # What a store that never saw it holds as well (a common word) is no trace of it.
        coincidences = traces(folder.with_name("never"), sought)
        assert traces(folder, set(sought) - set(coincidences)) == {}
        assert len(coincidences) < 0.1 * len(sought)


def make_any_index(bank: MemoryBank):
    from longmem.approximate import BankIndex

    heads, _, size = bank.keys_HNE.shape
    query_HQE = torch.randn(heads, 100, size, generator=torch.Generator().manual_seed(7))
    return BankIndex.choose(bank.keys_HNE, query_HQE, top_k=4, lists=False)


def test_what_a_killed_writer_left_goes_with_it(folder: Path, model: LongMem) -> None:
    with MemoryStore.open(folder) as store:
        write(store.bank("notes", model.bank_spec), model, [("a", SECRET), ("b", TINY_TEXT)])
        left = folder / "segments" / "0123.tmp"  # of a consolidation, say
        left.write_bytes(SECRET.encode())
        store.forget("notes", [Stretch("a")])
        assert not left.exists() and SECRET.encode() not in readable(folder)


def test_traces_are_found_at_any_place(tmp_path: Path) -> None:
    needle = b"0123456789abcdef"
    for shift in range(9):
        (tmp_path / "file").write_bytes(b"x" * shift + needle + b"y" * shift)
        assert traces(tmp_path, [needle, b"0123456789abcdeX"]) == {needle: "file"}
    (tmp_path / "file").write_bytes(needle[:-1])
    assert traces(tmp_path, [needle]) == {} and traces(tmp_path, []) == {}


# ---- receipts ----------------------------------------------------------------------------------------------


def test_receipts_are_chained_and_cannot_be_altered(folder: Path, model: LongMem) -> None:
    with MemoryStore.open(folder) as store:
        bank = write(store.bank("notes", model.bank_spec), model, [("a", "One."), ("b", "Two."), ("c", "Three.")])
        given_out = [store.forget("notes", [Stretch(source)]) for source in "ab"]
        bank.refresh()
        assert store.receipts() == given_out and [receipt.number for receipt in given_out] == [1, 2]
        assert all(store.is_genuine(receipt) for receipt in given_out)
        facts = given_out[1].facts
        assert facts["previous"] == given_out[0].signature and facts["signed_with"] == "HMAC-SHA256"
        (removed,) = facts["removed"]
        assert (removed["whole"], removed["spans"], removed["characters"]) == (True, [[0, 4]], 4)
        (lost,) = facts["banks"]
        assert lost["bank"] == "notes" and lost["tokens"] > 0 and lost["from_version"] == 2
        assert len(facts["files"]) == 1 and "Two" not in given_out[1].said
        forged = dataclasses.replace(given_out[1], said=given_out[1].said.replace('"whole": true', '"whole": false'))
        assert not store.is_genuine(forged)
        with store.manifest.transaction() as database:
            database.execute("UPDATE receipt SET said = replace(said, '4', '5') WHERE id = 1")
        assert not store.is_genuine(given_out[1])
        (fault,) = store.verify().faults
        assert fault.kind == "receipt"


# ---- what drew on it -----------------------------------------------------------------------------------------


def test_generated_text_that_drew_on_it_is_listed(folder: Path, model: LongMem) -> None:
    with MemoryStore.open(folder) as store:
        domain = write(store.bank("domain", model.bank_spec), model, [("facts", SECRET), ("more", "Else.")])
        user = store.bank("user", model.bank_spec)

        def turn(source: str, text: str, on: DrawnOn) -> None:
            entry = model.encode_text(
                text, source=source, char_start=user.length_of(source), before_N=user.tokens_of(source)
            )
            user.append(dataclasses.replace(entry, drew_on=(on,)))

        turn("chat", "Q: key? A: stone. ", DrawnOn("domain", "facts", 10, 30, 0.4))
        turn("chat", "Q: else? A: no. ", DrawnOn("domain", "more", 0, 5, 0.2))
        turn("talk", "As I said: the stone.", DrawnOn(None, "chat", 12, 17, 0.3))
        generated = store.preview_forget("domain", [Stretch("facts", 0, 20)]).generated
        # The turn that drew on it, and the one that drew on that turn.
        assert [(one.bank, one.text, one.weight) for one in generated] == [
            ("user", "Q: key? A: stone. ", 0.4),
            ("user", "As I said: the stone.", 0.3),
        ]
        assert store.preview_forget("domain", [Stretch("facts", 30)]).generated == ()
        assert len(store.preview_forget("domain", [Stretch("more")]).generated) == 1
        store.forget("domain", [Stretch("facts", 0, 20)], model)
        store.forget("user", [one.stretch for one in generated], model)
        domain.refresh(), user.refresh()
        assert user.text_of("chat") == "Q: else? A: no. " and user.sources == ("chat",)
        # The rows that said so are gone; what drew on something else is known still.
        assert store.preview_forget("domain", [Stretch("facts")]).generated == ()
        (other,) = store.preview_forget("domain", [Stretch("more")]).generated
        assert (other.start, other.text) == (0, "Q: else? A: no. ")


def test_places_that_were_drawn_on_move_with_their_text(folder: Path, model: LongMem) -> None:
    with MemoryStore.open(folder) as store:
        bank = write(store.bank("notes", model.bank_spec), model, [("a", SECRET + "The bees sleep.")])
        bees = len(SECRET)
        entry = model.encode_text("They sleep.", source="chat")
        bank.append(dataclasses.replace(entry, drew_on=(DrawnOn(None, "a", bees, bees + 8, 0.5),)))
        store.forget("notes", [Stretch("a", 0, bees)], model)
        assert len(store.preview_forget("notes", [Stretch("a", 0, 8)]).generated) == 1
        assert store.preview_forget("notes", [Stretch("a", 8, 15)]).generated == ()


def test_forgetting_removes_an_index(folder: Path) -> None:
    from test_store import SPEC

    with MemoryStore.open(folder) as store:
        bank = store.bank("notes", SPEC)
        bank.append(make_entry("a", "x" * 150))
        bank.append(make_entry("b", "x" * 150))
        bank.save_index(make_index(bank))
        store.forget("notes", [Stretch("b")])
        assert list((folder / "indexes").iterdir()) == []


# ---- banks in few bits, and banks that were thinned --------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_bank_in_few_bits_forgets_to_the_bit(folder: Path, model: LongMem, precision: Precision) -> None:
    spec = model.bank_spec_in(precision)
    with MemoryStore.open(folder) as store:
        bank = write(store.bank("notes", spec), model, [("a", TINY_TEXT + SECRET), ("b", "Other. "), ("a", "End.")])
        before = {source: (bank.tokens_of(source), bank.length_of(source)) for source in bank.sources}
        entry = BankEntry("a", SECRET, 0, before["a"][0][-40:], torch.zeros(40, 2), *[torch.zeros(1, 0, 1)] * 2)
        store.forget("notes", [Stretch("a", len(TINY_TEXT), len(TINY_TEXT + SECRET))], model)
        never = write(MemoryBank(spec), model, [("a", TINY_TEXT), ("b", "Other. "), ("a", "End.")])
        assert_same(store.bank("notes"), never)
        assert torch.equal(logits(model, store.bank("notes")), logits(model, never))
        sought = [needle for needle, kind in needles(entry).items() if kind == "text"]
        assert sought and traces(folder, sought) == {} and store.verify().ok


def test_a_thinned_bank_keeps_the_rows_it_had(folder: Path, model: LongMem) -> None:
    with MemoryStore.open(folder) as store:
        bank = write(store.bank("notes", model.bank_spec), model, [("a", TINY_TEXT), ("b", "Other. "), ("a", SECRET)])
        bank.thin(torch.arange(len(bank)) % 3 > 0)
        place = {int(n) for n in bank.place_N[bank.source_index_N == 0]}
        start = TINY_TEXT.index("Her brother")
        first = int((bank.offsets_N2[bank.source_index_N == 0][:, 1] <= start).sum())
        store.forget("notes", [Stretch("a", start, start + 20)], model)
        again = store.bank("notes")
        never = write(model.new_bank(), model, [("a", TINY_TEXT[:start] + TINY_TEXT[start + 20 :])])
        write(never, model, [("b", "Other. "), ("a", SECRET)])
        assert again.text_of("a") == never.text_of("a") and torch.equal(again.tokens_of("a"), never.tokens_of("a"))
        # Rows before the cut are those that were there; each is, bit for bit, what a fresh write has in its place.
        mine = again.place_N[again.source_index_N == 0].tolist()
        assert mine[:first] == sorted(place)[:first] and len(mine) < len(never.tokens_of("a"))
        theirs = {int(n): row for row, n in enumerate(never.place_N) if int(never.source_index_N[row]) == 0}
        rows = [theirs[n] for n in mine]
        ours_N = again.source_index_N == 0
        assert torch.equal(again.keys_HNE[:, ours_N], never.keys_HNE[:, rows])
        assert torch.equal(again.values_HNE[:, ours_N], never.values_HNE[:, rows])
        assert store.verify().ok
        for path in segment_files(folder):
            path.unlink()
        store.repair(model)
        assert_same(store.bank("notes"), again)


@pytest.mark.parametrize("precision", ["full", "int4"])
def test_thinned_banks_are_forked_merged_and_exported(folder: Path, model: LongMem, precision: Precision) -> None:
    with MemoryStore.open(folder) as store:
        bank = write(store.bank("notes", model.bank_spec_in(precision)), model, [("a", TINY_TEXT), ("b", SECRET)])
        store.fork("notes", "notes/fork")
        fork = store.bank("notes/fork")
        write(fork, model, [("c", "Of the fork alone. ")])
        store.consolidate("notes/fork")
        bank.thin(torch.arange(len(bank)) % 2 > 0)
        store.fork("notes", "copy")
        store.bank("empty", store.bank("notes").spec)
        store.merge("empty", "notes")
        store.export("notes", folder / "file")
        store.import_(folder / "file", "imported")
        for name in ("notes", "copy", "empty", "imported"):
            assert_same(store.bank(name), bank)
        # What is shared is thinned for all; what only the fork holds is not.
        fork.refresh()
        assert_same(store.bank("notes/fork"), fork)
        assert len(fork) == len(bank) + len(fork.tokens_of("c"))
        assert store.verify().ok
        write(store.bank("full", model.bank_spec_in("int8")), model, [("z", "Rounded otherwise. ")])
        with pytest.raises(BankMismatchError, match="in int8"):
            store.merge("notes", "full")
