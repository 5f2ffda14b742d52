//! Restoring a VM into Cloud Hypervisor, which asks for pages over a socket instead of handing its userfaultfd over.
//!
//! We play the sending side of its local migration: the configuration, a memory file for each slot, the state; and answer
//! faults over a second connection, by writing the page to the slot's file. What the guest writes goes to the same file,
//! so that a page is written once and never again.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use epochfs_format::PAGE_SIZE;
use rustix::fs::{MemfdFlags, SeekFrom};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::Deserialize;

use super::faults::{Retry, read};
use super::layout::HUGE;
use super::peer::Peer;
use super::server::{OnDamage, Options};
use super::vm::{PAGE, kill};
use crate::epoch::{Epoch, StreamReader};
use crate::error::{Error, Kind, Result};
use crate::platform::lock::lock;
use crate::platform::socket::connect;

/// The largest page that is asked for.
const PAGE_LEN_MAX: u64 = 1 << 30;

/// The largest configuration or state.
const DOCUMENT_LEN_MAX: u64 = 256 << 20;

/// A step of a migration is answered within this time: restoring devices may take a while.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(120);

/// The file of a snapshot that tells what the memory looks like, as Cloud Hypervisor's offload daemon names it.
const CONFIG: &str = "migration_config.json";
const STATE: &str = "state.json";

/// What is said over the wire.
mod command {
    pub const START: u16 = 1;
    pub const CONFIG: u16 = 2;
    pub const STATE: u16 = 3;
    pub const COMPLETE: u16 = 5;
    pub const ABANDON: u16 = 6;
    pub const MEMORY_FD: u16 = 7;
    pub const COMPLETE_PAUSED: u16 = 8;
    pub const PAGE_FAULT: u16 = 9;
}

/// That a connection is for faults.
const FAULT_ROLE: u16 = 2;

const OK: u16 = 1;
const ERROR: u16 = 2;

/// Requests and answers alike: a number, six bytes of padding, the length of what follows.
const HEADER_LEN: usize = 16;

/// A VM to restore.
pub struct Offload {
    epoch: Epoch,
    /// What stands before the names of its streams: nothing, or a directory and a slash.
    prefix: String,
    config: Vec<u8>,
    state: Vec<u8>,
    slots: Vec<Slot>,
}

/// A region of guest memory.
struct Slot {
    number: u32,
    gpa: u64,
    len: u64,
    /// Where the region begins in its file.
    file_offset: u64,
    stream: String,
    file: OwnedFd,
    /// The same file by itself: the monitor has the other one's position.
    own: File,
    /// Pages that were written, a bit each. Held while pages are written.
    given: Mutex<Vec<u64>>,
}

#[derive(Deserialize)]
struct Config {
    memory_manager_data: MemoryManagerData,
}

#[derive(Deserialize)]
struct MemoryManagerData {
    guest_ram_mappings: Vec<Mapping>,
}

#[derive(Deserialize)]
struct Mapping {
    slot: u32,
    gpa: u64,
    size: u64,
    file_offset: u64,
}

/// What was served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    pub faults: u64,
    pub pages: u64,
}

impl Offload {
    /// Finds a snapshot in an epoch: in a directory of it, or at its top.
    pub fn new(epoch: Epoch, directory: &str) -> Result<Self> {
        let directory = directory.trim_matches('/');
        let prefix = if directory.is_empty() { String::new() } else { format!("{directory}/") };
        let document = |name: &str| document(&epoch, &format!("{prefix}{name}"));
        let (config, state) = (document(CONFIG)?, document(STATE)?);
        let parsed: Config = serde_json::from_slice(&config)
            .map_err(|error| Error::usage(format!("{prefix}{CONFIG} of {}: {error}", epoch.name())))?;
        let mappings = parsed.memory_manager_data.guest_ram_mappings;
        if mappings.is_empty() {
            return Err(Error::usage(format!("{prefix}{CONFIG} of {} names no memory", epoch.name())));
        }
        let slots = mappings.iter().map(|mapping| Slot::new(&epoch, &prefix, mapping)).collect::<Result<_>>()?;
        Ok(Self { epoch, prefix, config, state, slots })
    }

    /// The bytes of memory, of all slots.
    #[allow(clippy::len_without_is_empty)] // It never is.
    pub fn len(&self) -> u64 {
        self.slots.iter().map(|slot| slot.len).sum()
    }

    /// What its memory's streams are called.
    pub fn streams(&self) -> String {
        format!("{}memory-*", self.prefix)
    }

    fn name(&self) -> String {
        format!("{} of {}", self.streams(), self.epoch.name())
    }

    /// Restores it into a monitor that waits at this socket for a migration with `memory_mode=postcopy`, and answers its
    /// faults until it wants no more. `found` hears of its process first.
    pub fn serve(
        &self,
        socket: &Path,
        is_resumed: bool,
        options: &Options,
        found: &mut dyn FnMut(&Peer) -> Result<()>,
    ) -> Result<Served> {
        let failed = |error: io::Error| {
            Error::io(format!("cannot connect to {}", socket.display()), error)
                .hint("first: ch-remote receive-migration receiver_url=unix:SOCKET,memory_mode=postcopy")
        };
        let mut migration = connect(socket).map_err(failed)?;
        let peer = Peer::of(&migration)?;
        found(&peer)?;
        migration.set_read_timeout(Some(ANSWER_WAIT_MAX)).map_err(failed)?;
        step(&mut migration, "start", command::START, &[])?;
        for slot in &self.slots {
            send_memory(&mut migration, slot)?;
        }
        step(&mut migration, "configuration", command::CONFIG, &self.config)?;
        // Before the state, for restoring it touches memory.
        let mut faults = connect(socket).map_err(failed)?;
        faults.write_all(&FAULT_ROLE.to_le_bytes()).map_err(failed)?;
        tracing::info!("serving {peer} with {}, {} MiB", self.name(), self.len() >> 20);
        let ending = faults.try_clone().map_err(failed)?;
        let stop = AtomicBool::new(false);
        let pages = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let answering = std::thread::Builder::new().name("vm faults".into()).spawn_scoped(scope, || {
                let served = self.answer(&mut faults, &peer, options, &pages);
                stop.store(true, Ordering::SeqCst);
                served
            });
            let answering = answering.map_err(|error| Error::io("cannot start a thread", error))?;
            if options.populate {
                scope.spawn(|| self.populate(&stop, &pages));
            }
            let complete = if is_resumed { command::COMPLETE } else { command::COMPLETE_PAUSED };
            let restored = step(&mut migration, "state", command::STATE, &self.state)
                .and_then(|()| step(&mut migration, "completion", complete, &[]));
            if restored.is_err() {
                stop.store(true, Ordering::SeqCst);
                // Ends the thread that answers.
                let _ = ending.shutdown(std::net::Shutdown::Both);
            }
            let faults = match answering.join() {
                // What went wrong with a fault is why the rest did.
                Ok(served) => served.and_then(|faults| restored.map(|()| faults))?,
                Err(_) => return Err(Error::new(Kind::Io, "the thread that answers faults is gone")),
            };
            Ok(Served { faults, pages: pages.load(Ordering::Relaxed) })
        })
    }

    /// Answers until the other end is closed: then the monitor has every page.
    fn answer(&self, faults: &mut UnixStream, peer: &Peer, options: &Options, pages: &AtomicU64) -> Result<u64> {
        let failed = |error: io::Error| Error::io("the connection for faults", error);
        let mut readers: Vec<StreamReader> = self.slots.iter().map(|slot| slot.reader(&self.epoch)).collect();
        let mut bytes = Vec::new();
        let mut count = 0;
        loop {
            let mut header = [0; HEADER_LEN];
            match faults.read_exact(&mut header) {
                Ok(()) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => {
                    return Ok(count);
                }
                Err(error) => return Err(failed(error)),
            }
            let (command, len) = decode(&header);
            if command == command::ABANDON {
                faults.write_all(&encode(OK, 0)).map_err(failed)?;
                return Ok(count);
            }
            if command != command::PAGE_FAULT || len != 16 {
                let _ = faults.write_all(&encode(ERROR, 0));
                return Err(Error::usage(format!("{peer} sent command {command} of {len} bytes instead of a fault")));
            }
            let mut range = [0; 16];
            faults.read_exact(&mut range).map_err(failed)?;
            let word = |at: usize| u64::from_le_bytes(range[at..at + 8].try_into().expect("eight bytes"));
            let (gpa, len) = (word(0), word(8));
            let Some((at, first)) = self.find(gpa, len) else {
                let _ = faults.write_all(&encode(ERROR, 0));
                return Err(Error::usage(format!("{peer} asked for {len} bytes at {gpa:#x}, where it has no memory")));
            };
            let slot = &self.slots[at];
            if let Some(touched) = &options.touched {
                touched(u64::from(slot.number), first);
            }
            bytes.resize(len as usize, 0);
            if !slot.is_given(first..first + len / PAGE)
                && let Err(error) = self.read_patiently(slot, &mut readers[at], first, &mut bytes, peer, options)
            {
                let _ = faults.write_all(&encode(ERROR, 0));
                return Err(error);
            }
            pages.fetch_add(slot.give(first, &bytes, true)?, Ordering::Relaxed);
            count += 1;
            faults.write_all(&encode(OK, 0)).map_err(failed)?;
        }
    }

    /// The slot that has these bytes, and their first page there.
    fn find(&self, gpa: u64, len: u64) -> Option<(usize, u64)> {
        if len == 0 || len > PAGE_LEN_MAX || !len.is_multiple_of(PAGE) || !gpa.is_multiple_of(PAGE) {
            return None;
        }
        let end = gpa.checked_add(len)?;
        let at = self.slots.iter().position(|slot| gpa >= slot.gpa && end <= slot.gpa + slot.len)?;
        Some((at, (gpa - self.slots[at].gpa) / PAGE))
    }

    /// Reads pages that the VM waits for, as long as they may still come.
    fn read_patiently(
        &self,
        slot: &Slot,
        reader: &mut StreamReader,
        first: u64,
        bytes: &mut [u8],
        peer: &Peer,
        options: &Options,
    ) -> Result<()> {
        let mut retry = Retry::new();
        let mut is_told = false;
        loop {
            let Err(error) = read(reader, first * PAGE, bytes) else { return Ok(()) };
            if let Some(wait) = retry.after(&error, options.patience) {
                std::thread::sleep(wait);
                continue;
            }
            let name = format!("{} of {}", slot.stream, self.epoch.name());
            let why = format!("page {first} of {name} cannot be read: {error}");
            if options.on_damage == OnDamage::Kill {
                kill(peer, &name, &why);
                return Err(error.context(format!("page {first} of {name}")));
            }
            if !is_told {
                tracing::error!("{peer} stands still until it can be read: {why}");
                is_told = true;
            }
            if peer.has_ended() {
                return Err(Error::not_found("the VM is gone"));
            }
            std::thread::sleep(Retry::HELD);
        }
    }

    /// Gives all data ahead of its use, in the order of addresses.
    fn populate(&self, stop: &AtomicBool, pages: &AtomicU64) {
        let _ = rustix::process::nice(5);
        let mut bytes = vec![0; HUGE as usize];
        for slot in &self.slots {
            let mut reader = slot.reader(&self.epoch);
            let mut from = 0;
            loop {
                let run = match reader.next_data(from) {
                    Ok(Some(run)) if run.start < slot.len => run.start..run.end.min(slot.len),
                    Ok(_) => break,
                    Err(error) => return tracing::warn!(%error, "{}: the rest is not filled ahead", self.name()),
                };
                let piece = run.start..(run.end.min(run.start + HUGE)).next_multiple_of(PAGE).min(slot.len);
                from = piece.end;
                let bytes = &mut bytes[..(piece.end - piece.start) as usize];
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                match read(&mut reader, piece.start, bytes).and_then(|()| slot.give(piece.start / PAGE, bytes, false)) {
                    Ok(given) => _ = pages.fetch_add(given, Ordering::Relaxed),
                    // Whoever touches these pages will tell.
                    Err(error) => tracing::warn!(%error, "{}: some pages are not filled ahead", self.name()),
                }
            }
        }
    }
}

impl Slot {
    fn new(epoch: &Epoch, prefix: &str, mapping: &Mapping) -> Result<Self> {
        let Mapping { slot: number, gpa, size: len, file_offset } = *mapping;
        let stream = format!("{prefix}memory-{number}");
        let stored = epoch.stream(stream.as_bytes())?.len();
        let is_whole = |value: u64| value.is_multiple_of(PAGE);
        let end = file_offset.checked_add(len).filter(|_| gpa.checked_add(len).is_some());
        let Some(end) = end.filter(|_| len > 0 && is_whole(len) && is_whole(gpa) && is_whole(file_offset)) else {
            return Err(Error::usage(format!("slot {number} of {} is no memory", epoch.name())));
        };
        if stored != len {
            return Err(Error::usage(format!(
                "{stream} of {} has {stored} bytes, and slot {number} has {len}",
                epoch.name()
            )));
        }
        let failed = |error: io::Error| Error::io("cannot make a memory file", error);
        let file = rustix::fs::memfd_create(format!("epochfs-slot-{number}"), MemfdFlags::CLOEXEC)
            .map_err(|error| failed(error.into()))?;
        rustix::fs::ftruncate(&file, end).map_err(|error| failed(error.into()))?;
        let own = File::options().read(true).write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let own = own.map_err(failed)?;
        let given = Mutex::new(vec![0; (len / PAGE).div_ceil(64) as usize]);
        Ok(Self { number, gpa, len, file_offset, stream, file, own, given })
    }

    fn reader(&self, epoch: &Epoch) -> StreamReader {
        epoch.stream(self.stream.as_bytes()).expect("it was opened before, and an epoch does not change")
    }

    fn is_given(&self, mut pages: std::ops::Range<u64>) -> bool {
        let given = lock(&self.given);
        pages.all(|page| given[(page / 64) as usize] >> (page % 64) & 1 == 1)
    }

    /// Writes those of these pages that were not written before: the guest may have changed them since. Returns how many.
    ///
    /// A page that is waited for must be there afterwards: one that was, and is gone, was given up by the guest.
    fn give(&self, first: u64, bytes: &[u8], is_waited_for: bool) -> Result<u64> {
        let failed = |error: io::Error| Error::io("cannot write to a VM's memory", error);
        let mut given = lock(&self.given);
        let is_new = |given: &[u64], page: u64| given[(page / 64) as usize] >> (page % 64) & 1 == 0;
        let (pages, _) = bytes.as_chunks::<PAGE_SIZE>();
        let mut count = 0;
        let mut at = 0;
        while at < pages.len() {
            let page = first + at as u64;
            let run = pages[at..].iter().enumerate();
            let run = run.take_while(|(next, _)| is_new(&given, page + *next as u64)).count();
            let offset = self.file_offset + page * PAGE;
            if run > 0 {
                self.own.write_all_at(pages[at..at + run].as_flattened(), offset).map_err(failed)?;
                (page..page + run as u64).for_each(|page| given[(page / 64) as usize] |= 1 << (page % 64));
                count += run as u64;
                at += run;
                continue;
            }
            if is_waited_for && self.is_hole(offset)? {
                self.own.write_all_at(&[0; PAGE_SIZE], offset).map_err(failed)?;
            }
            at += 1;
        }
        Ok(count)
    }

    fn is_hole(&self, offset: u64) -> Result<bool> {
        match rustix::fs::seek(&self.own, SeekFrom::Data(offset)) {
            Ok(data) => Ok(data != offset),
            Err(Errno::NXIO) => Ok(true),
            Err(error) => Err(Error::io("cannot look at a VM's memory", error.into())),
        }
    }
}

fn document(epoch: &Epoch, name: &str) -> Result<Vec<u8>> {
    let mut reader = epoch.stream(name.as_bytes()).map_err(|error| match error.kind() {
        Kind::NotFound => error.hint(format!(
            "{} should hold a snapshot as Cloud Hypervisor's offload daemon writes it; --directory says where",
            epoch.name()
        )),
        _ => error,
    })?;
    if reader.len() > DOCUMENT_LEN_MAX {
        return Err(Error::usage(format!("{name} of {} has {} bytes", epoch.name(), reader.len())));
    }
    let mut bytes = vec![0; reader.len() as usize];
    reader.read_at(0, &mut bytes)?;
    Ok(bytes)
}

fn encode(number: u16, len: u64) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    bytes[..2].copy_from_slice(&number.to_le_bytes());
    bytes[8..].copy_from_slice(&len.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8; HEADER_LEN]) -> (u16, u64) {
    let number = u16::from_le_bytes([bytes[0], bytes[1]]);
    (number, u64::from_le_bytes(bytes[8..].try_into().expect("eight bytes")))
}

/// Sends a command and waits until it is done.
fn step(migration: &mut UnixStream, what: &str, command: u16, payload: &[u8]) -> Result<()> {
    let failed = |error: io::Error| Error::io(format!("restoring failed at the {what}"), error);
    migration.write_all(&encode(command, payload.len() as u64)).map_err(failed)?;
    migration.write_all(payload).map_err(failed)?;
    answer_of(migration, what)
}

fn answer_of(migration: &mut UnixStream, what: &str) -> Result<()> {
    let mut header = [0; HEADER_LEN];
    migration.read_exact(&mut header).map_err(|error| Error::io(format!("restoring failed at the {what}"), error))?;
    match decode(&header) {
        (OK, 0) => Ok(()),
        (status, len) => Err(Error::usage(format!("the monitor refuses the {what} (status {status}, {len} bytes)"))
            .hint("its own log says why")),
    }
}

/// Sends a slot's memory: the request, then the slot's number with the file.
fn send_memory(migration: &mut UnixStream, slot: &Slot) -> Result<()> {
    let failed = |error: io::Error| Error::io(format!("the memory of slot {} cannot be sent", slot.number), error);
    migration.write_all(&encode(command::MEMORY_FD, 4)).map_err(failed)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = [slot.file.as_fd()];
    if !control.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(failed(Errno::TOOBIG.into()));
    }
    let number = slot.number.to_le_bytes();
    // Four bytes go at once, or not at all.
    let sent = rustix::net::sendmsg(&*migration, &[IoSlice::new(&number)], &mut control, SendFlags::NOSIGNAL);
    sent.map_err(|error| failed(error.into()))?;
    answer_of(migration, "memory")
}
