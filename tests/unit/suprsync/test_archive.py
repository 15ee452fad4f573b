"""The place of a file in the archive, and whether SupRsync may delete it. No remote path leaves the archive."""

from __future__ import annotations

import contextlib
import json
import os.path
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from socs_monitor.suprsync import archive
from socs_monitor.suprsync.archive import ArchiveError, Entry, create_remote_path, is_deletable
from socs_monitor.wire import messages
from socs_monitor.wire.text import sanitize
from tests.strategies import json_values, nasty_text

BASE = "/base/of/suprsync"
OUTPUTS = "/data/smurf_data/20240105/crate1slot2/1704450000/outputs"
META: dict[str, Any] = {
    "path": f"{OUTPUTS}/1704450001_data.txt", "pub_id": "crate1slot2", "timestamp": 1704450002.5,
    "action": "take_iv", "action_ts": "1704450000", "plot": False, "format": "txt",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "remote_path"),
    [
        ({}, "17044/crate1slot2/1704450000_take_iv/outputs/1704450001_data.txt"),
        ({"plot": True}, "17044/crate1slot2/1704450000_take_iv/plots/1704450001_data.txt"),
        ({"action_ts": 1704450000}, "17044/crate1slot2/1704450000_take_iv/outputs/1704450001_data.txt"),
        ({"action": None, "action_ts": None}, "17044/crate1slot2/None_None/outputs/1704450001_data.txt"),
        ({"timestamp": 1699999999}, "16999/crate1slot2/1704450000_take_iv/outputs/1704450001_data.txt"),
        ({"timestamp": "1699999999.5"}, "16999/crate1slot2/1704450000_take_iv/outputs/1704450001_data.txt"),
        ({"path": "/x/../y.txt"}, "17044/crate1slot2/1704450000_take_iv/outputs/y.txt"),
        ({"path": "y.txt"}, "17044/crate1slot2/1704450000_take_iv/outputs/y.txt"),
        ({"pub_id": "STREAMER:a"}, "17044/STREAMER:a/1704450000_take_iv/outputs/1704450001_data.txt"),
        ({"action": "a..b"}, "17044/crate1slot2/1704450000_a..b/outputs/1704450001_data.txt"),
        ({"action": "._-+=@,:%"}, "17044/crate1slot2/1704450000_._-+=@,:%/outputs/1704450001_data.txt"),
        ({"action": "Ἀθῆνα_e\u0301_Ⅷ²"}, "17044/crate1slot2/1704450000_Ἀθῆνα_e\u0301_Ⅷ²/outputs/1704450001_data.txt"),
        ({"action": "ü" * 100}, f"17044/crate1slot2/1704450000_{'ü' * 100}/outputs/1704450001_data.txt"),
    ],
)
def test_a_pysmurf_file_goes_by_its_action(changed: dict[str, Any], remote_path: str) -> None:
    assert create_remote_path({**META, **changed}, "smurf") == remote_path


@pytest.mark.parametrize("left_out", ["action", "action_ts", "plot"])
def test_fields_that_a_publisher_leaves_out_are_null(left_out: str) -> None:
    without = {name: value for name, value in META.items() if name != left_out}

    assert create_remote_path(without, "smurf") == create_remote_path({**META, left_out: None}, "smurf")


@pytest.mark.parametrize(
    ("path", "remote_path"),
    [
        ("/data/so/timestreams/17044/crate1slot2/1704450000_002.g3", "17044/crate1slot2/1704450000_002.g3"),
        ("/a/b/c.g3", "a/b/c.g3"),
        ("/data//so/timestreams/17044//crate1slot2/./x.g3", "17044/crate1slot2/x.g3"),
        ("/data/17044/crate1slot2/sub/../x.g3", "17044/crate1slot2/x.g3"),
    ],
)
def test_a_timestream_goes_by_its_last_three_components(path: str, remote_path: str) -> None:
    assert create_remote_path({"path": path, "pub_id": "STREAMER:x"}, "timestreams") == remote_path


@pytest.mark.parametrize(
    ("changed", "archive_name"),
    [
        ({"action": "../../../../../../etc/cron.d/x"}, "smurf"),
        ({"action": "a/b"}, "smurf"),
        ({"action_ts": "/abs"}, "smurf"),
        ({"action_ts": "a/.."}, "smurf"),
        ({"pub_id": "/abs/olute"}, "smurf"),
        ({"pub_id": ".."}, "smurf"),
        ({"pub_id": "."}, "smurf"),
        ({"pub_id": ""}, "smurf"),
        ({"timestamp": "../"}, "smurf"),
        ({"timestamp": "a/b/c"}, "smurf"),
        ({"path": "/a/.."}, "smurf"),
        ({"path": "/a/"}, "smurf"),
        ({"path": "/a/b c.txt"}, "smurf"),
        ({"path": "/a/b\\c.txt"}, "smurf"),
        ({"path": "/a/b\x7f.txt"}, "smurf"),
        ({"path": f"/a/{'ü' * 128}"}, "smurf"),
        ({"action": "a\nb"}, "smurf"),
        ({"action": "a" * 256}, "smurf"),
        ({"pub_id": "-rf"}, "smurf"),
        ({"path": "/a/-rf"}, "smurf"),
        ({"path": "/a/-rf/c.g3"}, "timestreams"),
        ({"path": "/x/c.g3"}, "timestreams"),
        ({"path": "c.g3"}, "timestreams"),
        ({"path": "../b/c.g3"}, "timestreams"),
        ({"path": "/a/b c/d.g3"}, "timestreams"),
        ({}, "SMURF"),
        ({}, "../smurf"),
        ({}, ""),
    ],
)
def test_a_file_without_a_safe_place_is_refused(changed: dict[str, Any], archive_name: str) -> None:
    with pytest.raises(ArchiveError):
        create_remote_path({**META, **changed}, archive_name)


ALLOWED = "._-+=@,:%"


@pytest.mark.parametrize("part", ["action", "action_ts", "pub_id", "file", "folder of a timestream"])
@pytest.mark.parametrize("character", ["$", "'", "`", "(", "\u200b", "\ud800", "\U000e0041", "☃"])
def test_a_refusal_names_the_character_and_what_to_do(part: str, character: str) -> None:
    text = "a" * 100 + character
    changed = {
        "file": {"path": f"/data/{text}"},
        "folder of a timestream": {"path": f"/a/{text}/c.g3"},
    }.get(part, {part: text})
    archive_name = "timestreams" if part == "folder of a timestream" else "smurf"

    with pytest.raises(ArchiveError) as refusal:
        create_remote_path({**META, **changed}, archive_name)
    reason = sanitize(str(refusal.value))
    assert sanitize(repr(character)) in reason
    assert reason.endswith("announce it again: socs-monitor send")


@given(character=st.characters())
def test_a_character_is_allowed_by_its_category(character: str) -> None:
    allowed = character in ALLOWED or unicodedata.category(character)[0] in "LMN"
    for part in (f"a{character}", f"a{character}b", f"ü{character}"):
        meta = {**META, "pub_id": part}
        if allowed:
            assert create_remote_path(meta, "smurf").split("/")[1] == part
        else:
            with pytest.raises(ArchiveError):
                create_remote_path(meta, "smurf")


# As pysmurf and sodetlib name what they write; the streamer's names are a session id and a number.
REAL_NAMES = (
    *("1704450001_b3_resonances.npy", "1704450001_b4_delay.png", "1704450001_adc.npy", "1704450001_iv_bias_all.npy"),
    *("1704450001_iv_raw_data.npy", "1704450001_1.00_10.00.txt", "1704450001_eta_b4_res007_dc12_tone10.png"),
    *("1704450001_channel_assignment_b4.txt", "1704450001_tune.npy", "1704450001_b4_full_band_resp.png"),
    *("1704450001_iv_rfracs.png", "1704450001_bs_rfrac_summary.png", "1704450001_tracking_results.npy"),
    *("1704450001_ci_sweep_transition.h5", "1704450001_f3dB_vs_lms_gain_b4.pkl", "1704450001_intial_Rfrac.png"),
    *("1704450001_tickle_response_b4c17.png", "1704450001_channel_state.npz", "1704450001_wls_vs_nphi0.txt"),
    *("run_info.yml", "sys_config.yml", "tickle_summary.tsv", "1704450001_optimize_atten.log"),
)
REAL_ACTIONS = (
    *("tune_band_serial", "full_band_resp", "track_and_check", "take_iv", "take_noise", "take_complex_impedance"),
    *("measure_bias_line_resistances", "optimize_lms_gain", "uxm_setup", "uxm_relock", None),
)
REAL_IDS = ("ufm_mv19", "crate1slot2", "STREAMER:ufm_mv19", "undeclared")


def test_real_names_actions_and_ids_are_allowed() -> None:
    for name in REAL_NAMES:
        create_remote_path({**META, "path": f"{OUTPUTS}/{name}"}, "smurf")
    for action in REAL_ACTIONS:
        create_remote_path({**META, "action": action}, "smurf")
    for pub_id in REAL_IDS:
        create_remote_path({**META, "pub_id": pub_id}, "smurf")
        create_remote_path({"path": f"/data/so/timestreams/17044/{pub_id}/1704450000_1000.g3"}, "timestreams")


@pytest.mark.parametrize(
    ("local_path", "archive_name", "deletable"),
    [
        (f"{OUTPUTS}/1704450001_data.txt", "smurf", True),
        ("/data/smurf_data/0/x", "smurf", True),
        ("/any/thing/123/x", "smurf", True),
        ("/data/smurf_data/tune/1704450000_tune.npy", "smurf", False),
        ("/data/smurf_data/status/1704450000_status.txt", "smurf", False),
        ("/data/smurf_data/x20240105/1704450000_data.txt", "smurf", False),
        ("/data/20240105/crate1slot2/data.txt", "smurf", False),
        ("/data/extra/smurf_data/20240105/data.txt", "smurf", False),
        ("/data/smurf_data/²/data.txt", "smurf", False),
        ("/data/smurf_data//20240105/x", "smurf", False),
        ("/x", "smurf", False),
        (f"{OUTPUTS}/1704450001_iv.npy", "smurf", False),
        (f"{OUTPUTS}/1704450001_drive.txt", "smurf", False),
        (f"{OUTPUTS}/1704450001_IV.npy", "smurf", True),
        (f"{OUTPUTS}/1704450001_channel_assignment_b0.txt", "smurf", False),
        (f"{OUTPUTS}/1704450001_tune.npy", "smurf", False),
        ("/data/smurf_data/20240105/tune/x.npy", "smurf", False),
        ("/data/so/timestreams/17044/crate1slot2/1704450000_002.g3", "timestreams", True),
        ("/data/so/timestreams/17044/crate1slot2/1704450000_tune.g3", "timestreams", True),
        ("/data/so/timestreams/17044/crate1slot2/../../../tune/1_tune.g3", "timestreams", False),
        ("/data/so/17044/timestreams/../crate1slot2/x.g3", "timestreams", False),
        ("/data/so/timestreams/17044//1704450000_002.g3", "timestreams", False),
        ("/data/so/timestreams/17044/crate1slot2/.g3", "timestreams", False),
        ("/data/so/timestreams/17044/crate1slot2/x.g3.npy", "timestreams", False),
        ("/data/so/timestreams/1704/crate1slot2/x.g3", "timestreams", False),
        ("/data/so/timestreams/170444/crate1slot2/x.g3", "timestreams", False),
        ("/data/so/timestreams/¹7044/crate1slot2/x.g3", "timestreams", False),
        ("/data/smurf_data/tune/1704450000_tune.npy", "timestreams", False),
        ("/tune/iv/channel_assignment.g3", "timestreams", False),
        (f"{OUTPUTS}/../../../../status/x.txt", "smurf", False),
    ],
)
def test_only_archived_files_of_a_dated_folder_may_be_deleted(
    local_path: str, archive_name: str, deletable: bool
) -> None:
    assert is_deletable(local_path, archive_name) is deletable


def entries(**changed: Any) -> list[Entry]:
    return list(archive.candidates({**META, **changed}))


def local_names(**changed: Any) -> list[str]:
    return [os.path.basename(entry.local_path) for entry in entries(**changed)]


@pytest.mark.parametrize(
    ("path", "file_format", "names"),
    [
        ("/d/x.npy", "npy", ["x.npy"]),
        ("/d/x.npy", "txt", ["x.npy"]),
        ("/d/x", "npy", ["x.npy", "x"]),
        ("/d/x", "npyt", ["x.npy", "x"]),
        ("/d/x.dat", "npy", ["x.dat.npy", "x.dat"]),
        ("/d/x", "txt", ["x", "x.npy"]),
        ("/d/x", "", ["x", "x.npy"]),
        ("/d/x", None, ["x", "x.npy"]),
    ],
)
def test_the_suffix_that_numpy_appends_is_looked_for(path: str, file_format: str | None, names: list[str]) -> None:
    assert local_names(path=path, format=file_format) == names
    remote_names = [os.path.basename(entry.remote_path) for entry in entries(path=path, format=file_format)]
    assert remote_names == names


@pytest.mark.parametrize(
    ("path", "spelled"),
    [
        ("/data//f.txt", "/data/f.txt"),
        ("//data/f.txt", "/data/f.txt"),
        ("/data/./f.txt", "/data/f.txt"),
        ("/data/.//././/f.txt", "/data/f.txt"),
        ("/data/../f.txt", "/data/../f.txt"),
        ("/data/.f.txt", "/data/.f.txt"),
        ("/data/.../f.", "/data/.../f."),
    ],
)
def test_a_file_has_one_spelling(path: str, spelled: str) -> None:
    assert next(archive.candidates({**META, "path": path})).local_path == spelled


@pytest.mark.parametrize("length", [251, 252, 255])
@pytest.mark.parametrize("character", ["x", "ü"])
def test_the_suffix_is_left_out_where_no_file_can_have_it(length: int, character: str) -> None:
    name = (character * 255)[: length // len(character.encode())]
    expected = [name, name + ".npy"] if len(name.encode()) <= 251 else [name]

    assert local_names(path=f"/d/{name}", format="txt") == expected
    assert local_names(path=f"/d/{name}", format="npy") == expected[::-1]


def test_a_registration_without_a_format_may_lack_the_suffix_too() -> None:
    meta = {name: value for name, value in META.items() if name != "format"}

    assert [entry.local_path for entry in archive.candidates(meta)] == [META["path"], META["path"] + ".npy"]


def test_a_timestream_is_looked_for_under_its_own_name_only() -> None:
    entry = Entry("timestreams", "/a/b/c.g3", "a/b/c.g3", deletable=False)

    assert entries(path="/a/b/c.g3", archive_name="timestreams", format="npy") == [entry]


def test_an_entry_has_all_that_suprsync_needs() -> None:
    remote_path = "17044/crate1slot2/1704450000_take_iv/outputs/1704450001_data.txt"

    assert entries()[0] == Entry("smurf", META["path"], remote_path, deletable=True)
    assert entries(path="/d/x.npy")[0].deletable is False


@pytest.mark.parametrize(
    "changed", [{"path": "x.txt"}, {"path": "./x.txt"}, {"archive_name": "other"}, {"path": "/a/"}]
)
def test_a_registration_that_can_never_be_a_row_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ArchiveError):
        entries(**changed)


def assert_stays_inside(remote_path: str) -> None:
    """Joined to the base and normalised, as SupRsync does it, the path is below the base and unchanged."""
    assert not remote_path.startswith("/")
    assert ".." not in remote_path.split("/")
    assert os.path.normpath(os.path.join(BASE, remote_path)) == f"{BASE}/{remote_path}"
    assert len(remote_path.split()) == 1, "md5sum's output could not be read"


ACCEPTED = st.fixed_dictionaries(
    {"path": nasty_text(), "pub_id": nasty_text(), "timestamp": st.integers() | st.floats() | nasty_text()},
    optional={
        "action": st.none() | nasty_text(),
        "action_ts": st.none() | st.integers() | nasty_text(),
        "plot": json_values(),
    },
)


@given(meta=ACCEPTED, archive_name=st.sampled_from(["smurf", "timestreams"]) | nasty_text())
def test_no_remote_path_leaves_the_archive(meta: dict[str, Any], archive_name: str) -> None:
    with contextlib.suppress(ArchiveError):
        assert_stays_inside(create_remote_path(meta, archive_name))


PAYLOADS = st.fixed_dictionaries(
    {
        "path": nasty_text().map("/data/20240105/a/".__add__) | nasty_text(),
        "timestamp": st.just(1704450000) | json_values(),
    },
    optional={
        **{name: json_values() for name in ("action", "action_ts", "format", "plot", "pub_id")},
        "archive_name": st.just("timestreams") | nasty_text() | json_values(),
    },
)


@given(kind=st.sampled_from(["data_file", "g3_file"]), pub_id=nasty_text(), payload=PAYLOADS)
def test_no_datagram_leads_out_of_the_archive(kind: str, pub_id: str, payload: dict[str, Any]) -> None:
    sent = json.dumps({"id": pub_id, "type": kind, "payload": payload})
    with contextlib.suppress(messages.MessageError, ArchiveError):
        for entry in archive.candidates(messages.parse_file(sent).meta):
            assert_stays_inside(entry.remote_path)
            assert entry.archive_name in ("smurf", "timestreams")
            assert entry.local_path in (payload["path"], payload["path"] + ".npy")
            assert os.path.basename(entry.local_path) == os.path.basename(entry.remote_path)


@pytest.mark.parametrize("file_format", ["txt", "npy"])
@pytest.mark.parametrize("folder", ["/d", "/d" * 1950], ids=["name", "path"])
def test_a_name_that_is_too_long_for_the_suffix_has_none(file_format: str, folder: str) -> None:
    for length, number in ((190, 2), (191, 1)) if len(folder) > 2 else ((251, 2), (252, 1), (255, 1)):
        path = f"{folder}/{'x' * length}"
        entries = list(archive.candidates({**META, "path": path, "format": file_format}))
        assert len(entries) == number
        assert path in [entry.local_path for entry in entries]


@pytest.mark.parametrize("field", ["action", "action_ts", "timestamp", "pub_id", "path"])
@pytest.mark.parametrize("archive_name", ["smurf", "timestreams"])
def test_invalid_unicode_is_refused(field: str, archive_name: str) -> None:
    meta = {**META, "path": "/d/e/f/x.npy", field: "/d/\ud800/e/f/x.npy", "archive_name": archive_name}
    if archive_name == "smurf" or field == "path":
        with pytest.raises(ArchiveError):
            list(archive.candidates(meta))


@pytest.mark.parametrize("field", ["action", "action_ts", "timestamp", "archive_name"])
@pytest.mark.parametrize("value", [[], ["a"], {}, {"a": 1}])
def test_lists_and_objects_are_not_part_of_a_path(field: str, value: object) -> None:
    with pytest.raises(ArchiveError, match=field):
        list(archive.candidates({**META, "path": "/d/x", field: value}))
