//! The thread that answers a VM's faults, and never waits for anything else.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::time::Timespec;

use super::layout::HUGE;
use super::ledger::Inbox;
use super::message::Message;
use super::server::{OnDamage, Options};
use super::vm::{Answer, End, PAGE, Vm};
use crate::epoch::StreamReader;
use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;

/// When something that failed is tried again.
#[derive(Clone, Copy)]
pub(super) struct Retry {
    since: Stopwatch,
    tries: u32,
}

impl Retry {
    /// How often a page is tried whose VM is held.
    pub const HELD: Duration = Duration::from_secs(5);

    /// How often a page that is damaged is read: what is wrong may have been wrong on the way only.
    const DAMAGE_TRIES: u32 = 5;

    /// The first and the longest wait.
    const WAIT: Duration = Duration::from_millis(2);
    const WAIT_MAX: Duration = Duration::from_secs(1);

    pub fn new() -> Self {
        Self { since: Stopwatch::start(), tries: 0 }
    }

    /// How long to wait after this error, or nothing where it is no use.
    pub fn after(&mut self, error: &Error, patience: Duration) -> Option<Duration> {
        self.tries += 1;
        let is_over = match error.kind() {
            Kind::Io | Kind::Unavailable | Kind::NoSpace => self.since.elapsed() >= patience,
            _ => self.tries >= Self::DAMAGE_TRIES,
        };
        (!is_over).then(|| Self::WAIT.saturating_mul(1 << self.tries.min(16)).min(Self::WAIT_MAX))
    }
}

/// How long it is looked for the next fault before the thread sleeps: to be woken on another processor may take longer
/// than the answer.
const SPIN: Duration = Duration::from_micros(50);

/// It is not, where the last fault came later than this.
const SPINS_BELOW: Duration = Duration::from_micros(200);

/// A page that took so long is worth a line.
const SLOW: Duration = Duration::from_secs(1);

/// A page that somebody waits for.
struct Waiting {
    /// Where it begins, in the process of the VM.
    address: u64,
    retry: Retry,
    /// When it is tried again, counted from its first moment.
    after: Duration,
    is_held: bool,
}

pub(super) struct FaultThread {
    vm: Arc<Vm>,
    inbox: Inbox,
    reader: StreamReader,
    options: Options,
    waiting: Vec<Waiting>,
    /// Whether faults follow each other closely.
    spins: bool,
    bytes: Vec<u8>,
    /// Something that no server can deal with.
    foreign: Option<String>,
}

impl FaultThread {
    pub fn new(vm: Arc<Vm>, inbox: Inbox, options: Options) -> Self {
        let reader = vm.image().reader();
        let bytes = vec![0; HUGE as usize];
        Self { vm, inbox, reader, options, waiting: Vec::new(), spins: false, bytes, foreign: None }
    }

    /// Returns how the VM's time here ended.
    pub fn run(mut self) -> End {
        let end = match self.serve() {
            Ok(end) => end,
            Err(error) => {
                // Without its messages nothing can be known of the VM.
                self.vm.kill(&format!("its userfaultfd cannot be used: {error}"));
                End::Killed
            }
        };
        self.vm.set_end(end);
        self.vm.end().unwrap_or(end)
    }

    fn serve(&mut self) -> std::result::Result<End, Errno> {
        // What a server that died had read and not dealt with; faults among it are raised again.
        self.vm.take_in(&mut self.inbox, &mut |_| {});
        self.vm.wake_all();
        loop {
            if self.vm.is_stopping() {
                return Ok(self.vm.end().unwrap_or(End::Stopped));
            }
            if self.vm.peer().has_ended() {
                return Ok(End::Exited);
            }
            self.drain()?;
            if let Some(what) = self.foreign.take() {
                let why = format!("it sent what cannot be served: {what}");
                match self.options.on_damage {
                    OnDamage::Kill => {
                        self.vm.kill(&why);
                        return Ok(End::Killed);
                    }
                    OnDamage::Hold => tracing::error!("{}: {why}", self.vm.peer()),
                }
            }
            if !self.answer_all()? {
                return Ok(self.vm.end().unwrap_or(End::Exited));
            }
            if self.vm.is_releasing() && self.waiting.is_empty() {
                self.vm.release(&mut self.inbox)?;
                return Ok(End::Released);
            }
            self.wait()?;
        }
    }

    /// Reads all messages before any is answered.
    fn drain(&mut self) -> std::result::Result<(), Errno> {
        let Self { vm, inbox, waiting, foreign, .. } = self;
        vm.drain(inbox, &mut |message| match message {
            Message::Fault(address) => {
                let Some(region) = vm.layout().at(address) else {
                    *foreign = Some(format!("a fault at {address:#x}, where it has no memory by what it said"));
                    return;
                };
                let address = address - (address - region.start) % region.page_size;
                // Several processors may wait for one page.
                if !waiting.iter().any(|other| other.address == address) {
                    waiting.push(Waiting { address, retry: Retry::new(), after: Duration::ZERO, is_held: false });
                }
            }
            Message::Removed(_) | Message::Unmapped(_) => {}
            Message::Protected(_) => *foreign = Some("a fault of write protection".to_owned()),
            Message::Foreign(what) => *foreign = Some(what.to_owned()),
        })
    }

    /// Answers what can be answered now. False once the VM is gone.
    fn answer_all(&mut self) -> std::result::Result<bool, Errno> {
        let mut at = 0;
        while at < self.waiting.len() {
            if self.waiting[at].retry.since.elapsed() < self.waiting[at].after {
                at += 1;
                continue;
            }
            match self.answer(at)? {
                Answer::Done => {
                    let done = self.waiting.remove(at);
                    self.vm.counters.faults.fetch_add(1, Ordering::Relaxed);
                    if done.retry.since.elapsed() > SLOW {
                        tracing::warn!("{} waited {:?} for a page", self.vm.peer(), done.retry.since.elapsed());
                    }
                }
                Answer::Deferred => at += 1,
                Answer::Gone => return Ok(false),
            }
        }
        Ok(true)
    }

    fn answer(&mut self, at: usize) -> std::result::Result<Answer, Errno> {
        let vm = self.vm.clone();
        let address = self.waiting[at].address;
        let region = *vm.layout().at(address).expect("only what lies in a region waits");
        let first = (address - region.start + region.offset) / PAGE;
        let pages = first..first + region.page_size / PAGE;
        let len = region.page_size as usize;
        let is_removed = vm.is_removed(&pages);
        if is_removed {
            self.bytes[..len].fill(0);
        } else if let Err(error) = read(&mut self.reader, first * PAGE, &mut self.bytes[..len]) {
            return Ok(self.failed(at, first, &error));
        }
        match vm.answer(&region, first, &mut self.bytes[..len]) {
            Ok(Answer::Done) => {
                let is_zero = epochfs_format::is_zero(&self.bytes[..len]);
                vm.counters.zero_faults.fetch_add(u64::from(is_zero), Ordering::Relaxed);
                if !is_removed {
                    vm.residency().demand(pages);
                    if let Some(touched) = &self.options.touched {
                        touched(vm.id(), first);
                    }
                }
                Ok(Answer::Done)
            }
            Ok(Answer::Deferred) => {
                self.vm.counters.deferred.fetch_add(1, Ordering::Relaxed);
                Ok(Answer::Deferred)
            }
            Ok(Answer::Gone) => Ok(Answer::Gone),
            // Memory may be free in a moment.
            Err(errno @ (Errno::NOMEM | Errno::NOSPC | Errno::INTR)) => {
                let error = Error::new(Kind::Io, format!("the kernel has no memory for it: {errno}"));
                Ok(self.failed(at, first, &error))
            }
            Err(error) => Err(error),
        }
    }

    /// A page could not be read or filled: it is tried again, or the VM's time is over.
    fn failed(&mut self, at: usize, page: u64, error: &Error) -> Answer {
        let waiting = &mut self.waiting[at];
        self.vm.counters.retries.fetch_add(1, Ordering::Relaxed);
        let elapsed = waiting.retry.since.elapsed();
        if let Some(wait) = waiting.retry.after(error, self.options.patience) {
            waiting.after = elapsed + wait;
            tracing::debug!(page, %error, "a page is read again");
            return Answer::Deferred;
        }
        let why = format!("page {page} of {} cannot be read: {error}", self.vm.image().name());
        match self.options.on_damage {
            OnDamage::Kill => {
                self.vm.kill(&why);
                Answer::Gone
            }
            OnDamage::Hold => {
                if !waiting.is_held {
                    tracing::error!("{} stands still until it can be read: {why}", self.vm.peer());
                }
                waiting.is_held = true;
                waiting.after = elapsed + Retry::HELD;
                Answer::Deferred
            }
        }
    }

    /// Waits for a message, the end of the process, the bell, or the moment to try a page again.
    fn wait(&mut self) -> std::result::Result<(), Errno> {
        let next = self.waiting.iter().map(|waiting| waiting.after.saturating_sub(waiting.retry.since.elapsed())).min();
        let timeout = next.map(|next| Timespec {
            tv_sec: next.as_secs().cast_signed(),
            // A removal that was read is made in a moment.
            tv_nsec: i64::from(next.subsec_nanos().max(20_000)),
        });
        let sources = self.vm.sources();
        if self.spins && self.waiting.is_empty() {
            let spinning = Stopwatch::start();
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            while spinning.elapsed() < SPIN {
                // The messages alone: the others are in no hurry.
                let mut polled = [PollFd::new(&sources[0], PollFlags::IN)];
                if rustix::event::poll(&mut polled, Some(&now)) != Ok(0) {
                    return Ok(());
                }
                // Whoever was just woken may want this very processor.
                std::thread::yield_now();
            }
        }
        let sleeping = Stopwatch::start();
        let mut polled = sources.each_ref().map(|source| PollFd::new(source, PollFlags::IN));
        match rustix::event::poll(&mut polled, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(()),
            Err(error) => return Err(error),
        }
        if polled[2].revents().contains(PollFlags::IN) {
            self.vm.hush();
        }
        // Only where the next fault comes soon it is worth a processor's time.
        self.spins = sleeping.elapsed() < SPINS_BELOW;
        Ok(())
    }
}

/// Reads bytes of a stream, and zeros past its end.
pub(super) fn read(reader: &mut StreamReader, offset: u64, bytes: &mut [u8]) -> Result<()> {
    let len = reader.read_at(offset, bytes)?;
    bytes[len..].fill(0);
    Ok(())
}
