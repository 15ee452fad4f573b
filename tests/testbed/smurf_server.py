"""A simulated SMuRF server: it writes and announces files as pysmurf and the streamer do.

Any mix of messages at any rate::

    with SmurfServer("/data", ("127.0.0.1", 8200), streams=6) as server:
        server.send(server.messages(600), rate=200.0)       # paced; each file is written just before it is announced
        server.burst(server.encode(server.messages(3000)))  # all files are written first
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

from socs_monitor.wire.publisher import Address, Publisher, data_file, g3_file, metadata

# Kinds of messages that `SmurfServer.messages` can make.
FILE_MIX = ("npy", "png", "txt", "g3")
FULL_MIX = (*FILE_MIX, "tune", "session_log", "session_data", "metadata")

# Sizes of the files, bytes. Real g3 files have several hundred MB.
SIZES: Mapping[str, int] = {"npy": 4096, "png": 4096, "txt": 512, "tune": 4096, "g3": 65536}

_ACTIONS = ("uxm_setup", "uxm_relock", "take_noise", "take_iv", "take_bias_steps")
_FILES_AN_ACTION = 50
_BLOCK = os.urandom(1 << 19).hex().encode()

# Scalar registers that a streamer reports: dotted rogue path, and a value of the real type.
_PROCESSOR = "AMCc.SmurfProcessor."
_CARRIER = "AMCc.FpgaTopLevel.AmcCarrierCore.AxiVersion."
_CRYO = "AMCc.FpgaTopLevel.AppTop.AppCore."
REGISTERS: Mapping[str, str | int | float | bool] = {
    **{_PROCESSOR + f"SOStream.{name}": value for name, value in (("open_g3stream", 1), ("stream_tag", "obs"))},
    **{_PROCESSOR + f"SOStream.{name}": "take_noise" for name in ("pysmurf_action", "stream_id")},
    **{_PROCESSOR + f"ChannelMapper.{name}": 1792 for name in ("NumChannels", "PayloadSize")},
    **{_PROCESSOR + f"Downsampler.{name}": 20 for name in ("Factor", "TriggerMode")},
    **{_PROCESSOR + f"{name}.Disable": False for name in ("Filter", "Unwrapper", "Downsampler")},
    **{_PROCESSOR + f"Filter.{name}": 4 for name in ("Order", "Gain")},
    **{_PROCESSOR + f"FrameRxStats.Frame{name}Cnt": 0 for name in ("", "Loss", "OutOrder", "Bad")},
    **{_CARRIER + name: 17 for name in ("UpTimeCnt", "FpgaVersion")},
    **{_CARRIER + name: "0x5ac98bb8" for name in ("GitHash", "BuildStamp")},
    **{_CRYO + f"RtmCryoDet.{name}": 76799 for name in ("RampMaxCnt", "FluxRampStartMode")},
    **{_CRYO + f"SysgenCryo.Base[{band}].bandCenterMHz": 4250.0 + 500 * band for band in range(6)},
    "AMCc.enable": True,
    "AMCc.FpgaTopLevel.AmcCarrierCore.AxiSysMonUltraScale.Temperature": 54.25,
}


class Message(NamedTuple):
    """A message to be sent.

    `file` is the path that the row of the registered file must have; None for other messages.
    """

    publisher: Publisher
    kind: str
    payload: Any
    file: str | None = None


class Stream:
    """One slot of the crate: the publishers of its pysmurf and its streamer, and their counters."""

    def __init__(self, slot: int, address: Address) -> None:
        self.stream_id = f"ufm_emu{slot}"
        self.pysmurf = Publisher(f"crate1slot{slot}", address)
        self.streamer = Publisher(f"STREAMER:{self.stream_id}", address)
        self.session_id = int(time.time())
        self.g3_files = itertools.count()
        self.outputs = itertools.count()
        self.registers = itertools.cycle(REGISTERS)


class SmurfServer:
    """A SMuRF server that writes files in the real directory layout and announces them with real publishers.

    Args:
        root: Folder used as ``/data``. Two servers that start in the same second must not share one.
        address: Host and UDP port of the monitor.
        streams: Number of streams (slots); each has a pysmurf and a streamer publisher.
        sizes: Sizes of the files by kind, bytes; the default for missing kinds is `SIZES`.
        seen_as: Path of `root` in the monitor's container. Announced paths begin with it.
        smurf_data: Folder of pysmurf's files below `root`. If it is empty, the dated folders are in `root` itself. In a
            root of two components (``/mnt/smurf``) the files are then deletable, as on a real server.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        address: Address = ("127.0.0.1", 8200),
        *,
        streams: int = 3,
        sizes: Mapping[str, int] = SIZES,
        seen_as: str | None = None,
        smurf_data: str = "smurf_data",
    ) -> None:
        self.root = os.path.abspath(root)
        self.streams = [Stream(slot, address) for slot in range(2, 2 + streams)]
        self._sizes = {**SIZES, **sizes}
        self._seen_as = self.root if seen_as is None else seen_as
        self._smurf_data = smurf_data
        self._numbers = itertools.count()
        self._folders: set[str] = set()
        self._makers: dict[str, Callable[[Stream, int], Message]] = {
            "npy": self._npy,
            "png": self._png,
            "txt": self._txt,
            "tune": self._tune,
            "g3": self._g3,
            "session_log": lambda stream, n: Message(stream.pysmurf, "session_log", f"step {n} done"),
            "session_data": lambda stream, n: Message(stream.pysmurf, "session_data", {"step": n, "name": "emulated"}),
            "metadata": self._metadata,
        }

    def __enter__(self) -> Self:
        for publisher in self._publishers():
            publisher.start()
        return self

    def __exit__(self, *_: object) -> None:
        for publisher in self._publishers():
            publisher.stop()
            publisher.close()

    def messages(self, count: int, mix: Sequence[str] = FILE_MIX) -> Iterator[Message]:
        """Yield messages, and write the file of each just before.

        Args:
            count: Number of messages.
            mix: Kinds of messages, out of `FULL_MIX`. Every stream sends them in turn, so a kind that is listed twice
                is twice as frequent.
        """
        for i in range(count):
            turn, slot = divmod(i, len(self.streams))
            yield self._makers[mix[turn % len(mix)]](self.streams[slot], next(self._numbers))

    def send(self, messages: Iterable[Message], rate: float | None = None) -> list[Message]:
        """Send messages, `rate` a second (None: as fast as possible), and return them."""
        begin = time.monotonic()
        sent: list[Message] = []
        for message in messages:
            if rate is not None and (early := begin + len(sent) / rate - time.monotonic()) > 0:
                time.sleep(early)  # pacing
            message.publisher.publish(message.payload, message.kind)
            sent.append(message)
        return sent

    def encode(self, messages: Iterable[Message]) -> list[tuple[Publisher, bytes]]:
        """Return the datagrams of a burst, so that sending takes no more than the system calls."""
        return [(message.publisher, message.publisher.encode(message.payload, message.kind)) for message in messages]

    def burst(self, datagrams: Sequence[tuple[Publisher, bytes]]) -> float:
        """Send datagrams as fast as the kernel accepts them, and return the seconds that it took."""
        begin = time.monotonic()
        for publisher, datagram in datagrams:
            publisher.send(datagram)
        return time.monotonic() - begin

    def _publishers(self) -> Iterator[Publisher]:
        for stream in self.streams:
            yield stream.pysmurf
            yield stream.streamer

    def _npy(self, stream: Stream, number: int) -> Message:
        size = self._sizes["npy"]
        header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }" % (size - 128)
        head = b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(117) + b"\n"
        # numpy.save appends the suffix, and many senders announce the name without it
        return self._output(stream, number, "outputs", f"data_{number}", ".npy", head, bare=number % 2 == 1)

    def _png(self, stream: Stream, number: int) -> Message:
        return self._output(stream, number, "plots", f"plot_{number}", ".png", b"\x89PNG\r\n\x1a\n")

    def _txt(self, stream: Stream, number: int) -> Message:
        return self._output(stream, number, "outputs", f"notes_{number}", ".txt", b"")

    def _output(
        self, stream: Stream, number: int, folder: str, name: str, suffix: str, head: bytes, *, bare: bool = False
    ) -> Message:
        count = next(stream.outputs) // _FILES_AN_ACTION
        ctime = stream.session_id + count  # every action has its own time
        day = time.strftime("%Y%m%d", time.gmtime(ctime))
        parts = (self._smurf_data, day, stream.stream_id, str(ctime), folder, f"{ctime}_{name}{suffix}")
        kind = suffix[1:]
        file = self._write(os.path.join(*parts), head, number, self._sizes[kind])
        payload = data_file(
            file.removesuffix(suffix) if bare else file,
            file_format=kind,
            action=_ACTIONS[count % len(_ACTIONS)],
            action_ts=str(ctime),
            plot=folder == "plots",
        )
        return Message(stream.pysmurf, "data_file", payload, file)

    def _tune(self, stream: Stream, number: int) -> Message:
        ctime = stream.session_id + number  # all are in one folder, so their times must differ
        path = os.path.join(self._smurf_data, "tune", f"{ctime}_tune.npy")
        file = self._write(path, b"\x93NUMPY\x01\x00", number, self._sizes["tune"])
        payload = data_file(file, file_type="tune", file_format="npy", action="uxm_setup", action_ts=str(ctime))
        return Message(stream.pysmurf, "data_file", payload, file)

    def _g3(self, stream: Stream, number: int) -> Message:
        name = f"{stream.session_id}_{next(stream.g3_files):03}.g3"
        path = os.path.join("so", "timestreams", name[:5], stream.stream_id, name)
        file = self._write(path, b"", number, self._sizes["g3"])
        return Message(stream.streamer, "g3_file", g3_file(file), file)

    def _metadata(self, stream: Stream, number: int) -> Message:
        path = next(stream.registers)
        value = REGISTERS[path]
        if type(value) is float:
            value += number % 100 / 100  # so that plots show a curve
        return Message(stream.streamer, "metadata", metadata(path, value))

    def _write(self, relative: str, head: bytes, number: int, size: int) -> str:
        """Write a unique file of `size` bytes, and return its path as the monitor sees it."""
        path = os.path.join(self.root, relative)
        folder = os.path.dirname(path)
        if folder not in self._folders:
            os.makedirs(folder, exist_ok=True)
            self._folders.add(folder)
        begin = (head + b"%016x\n" % number)[:size]
        with open(path, "wb") as file:
            file.write(begin)
            for offset in range(len(begin), size, len(_BLOCK)):
                file.write(_BLOCK[: size - offset])
        return os.path.join(self._seen_as, relative)
