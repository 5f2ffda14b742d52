//! The loop that protects one machine: capture it, wait until the epoch is durable, look what that cost, decide when to do
//! it again. One epoch is on its way at a time, so nothing ever queues.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use serde::{Deserialize, Serialize};

use super::host::{Host, host_load};
use super::outputs::Outputs;
use super::policy::{Decision, Limit, Observation, Policy};
use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;
use crate::platform::process::NamedProcess;
use crate::vmm::agent::{Agent, Capture, Health, Heartbeat};

/// How often a machine is looked at that cannot be captured, and news are told while nothing happens.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// How often it is looked again whether the last epoch is durable, once this was told to stop.
const STOP_PATIENCE: u32 = 10;

/// Pauses of which the distribution is told.
const PAUSES_KEPT: usize = 1000;

/// What going through the memory costs the machine, as a share of the time it takes; and a page that it writes to again.
const PREPARING: f64 = 0.25;
const PAGE_AGAIN: Duration = Duration::from_nanos(2500);

/// An epoch that became durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stored {
    pub epoch: u64,
    pub changed_pages: u64,
    pub stored_bytes: u64,
    /// Bytes that commits may still take in the store, where it has an end.
    pub room: Option<u64>,
}

/// An epoch on its way.
pub struct Ticket {
    pub done: Receiver<Result<Stored>>,
    /// Waits to be told whether the machine stood still until it was frozen: only then it becomes one.
    pub stood_still: Sender<bool>,
}

/// Where a machine's epochs are made.
pub trait Epochs: Send {
    /// Begins an epoch of what the machine's files hold; returns when they may be written to again.
    fn freeze(&mut self) -> Result<Ticket>;
}

/// How a machine's protection is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProtectionStatus {
    pub machine: String,
    /// The process that says it.
    #[serde(default)]
    pub process: Option<NamedProcess>,
    /// When this was said, by the host's clock since it was started.
    pub said_at_ms: u64,
    /// `starting`, `protected`, `storing` (longer than usual), `failing`, `idle` (it stands still), `silent` (its guest gives
    /// no sign of life), `lost`, `ended`.
    pub state: String,
    /// Why, where it is not protected.
    pub why: Option<String>,
    /// What becomes of its memory.
    pub how: String,
    /// The disks that it writes to and that are in none of its epochs.
    pub elsewhere: Vec<String>,
    /// How long ago its guest gave a sign of life, where that is looked at.
    pub beat_age_ms: Option<f64>,
    pub newest_epoch: Option<u64>,
    /// How old the state is that would be restored.
    pub age_ms: Option<f64>,
    pub rpo_ms: Option<f64>,
    /// Whether that is met, and how often it was not.
    pub meets_rpo: Option<bool>,
    pub rpo_misses: u64,
    pub interval_ms: f64,
    /// What sets the interval, and what that means.
    pub limit: Option<Limit>,
    pub reason: String,
    pub epochs: u64,
    pub failures: u64,
    /// Of the last capture.
    pub pause_ms: f64,
    pub pause_parts_ms: Vec<(String, f64)>,
    pub prepared_ms: f64,
    pub durable_ms: f64,
    pub changed_pages: u64,
    pub stored_bytes: u64,
    /// Of the last captures.
    pub pause_mean_ms: f64,
    pub pause_p50_ms: f64,
    pub pause_p99_ms: f64,
    /// The share of the machine's time that the last interval cost it.
    pub overhead: f64,
    /// Threads that want to run on this host, for each processor.
    pub host_load: f64,
    /// Bytes that commits may still take in the store, where it has an end.
    pub room_bytes: Option<u64>,
}

/// The pauses of the last captures.
#[derive(Default)]
pub struct Pauses {
    last: Vec<f64>,
    next: usize,
}

impl Pauses {
    /// One more, of which the status tells.
    pub fn add(&mut self, pause: Duration, status: &mut ProtectionStatus) {
        status.pause_ms = ms(pause);
        if self.last.len() < PAUSES_KEPT {
            self.last.push(ms(pause));
        } else {
            self.last[self.next] = ms(pause);
        }
        self.next = (self.next + 1) % PAUSES_KEPT;
        let mut sorted = self.last.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| sorted[((sorted.len() as f64 * share) as usize).min(sorted.len() - 1)];
        status.pause_mean_ms = sorted.iter().sum::<f64>() / sorted.len() as f64;
        (status.pause_p50_ms, status.pause_p99_ms) = (at(0.5), at(0.99));
    }
}

/// One machine's protection.
pub struct Protection {
    pub machine: String,
    pub policy: Policy,
    /// How much more its work is worth than that of a machine with 1.
    pub weight: f64,
    pub agent: Box<dyn Agent>,
    pub epochs: Box<dyn Epochs>,
    pub host: Arc<Host>,
    /// Where its guest's signs of life are looked for.
    pub heartbeat: Option<Heartbeat>,
    /// Who holds back what it says until the epoch is durable that explains it, if anybody does.
    pub outputs: Option<Box<dyn Outputs>>,
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// What is known while it runs.
struct Run<'a> {
    status: ProtectionStatus,
    /// When the state was captured that would be restored.
    newest: Option<Stopwatch>,
    pauses: Pauses,
    is_missed: bool,
    tell: &'a mut dyn FnMut(&ProtectionStatus),
}

impl Run<'_> {
    fn tell(&mut self) {
        let age = self.newest.map(|newest| ms(newest.elapsed()));
        self.status.age_ms = age;
        let is_missed = matches!((age, self.status.rpo_ms), (Some(age), Some(rpo)) if age > rpo);
        if is_missed && !self.is_missed {
            self.status.rpo_misses += 1;
            tracing::warn!(
                machine = self.status.machine,
                age_ms = age,
                rpo_ms = self.status.rpo_ms,
                reason = self.status.reason,
                "more work would be lost than may be"
            );
        }
        self.is_missed = is_missed;
        if is_missed {
            self.status.meets_rpo = Some(false);
        }
        (self.tell)(&self.status);
    }

    fn is(&mut self, state: &str, why: Option<String>) {
        if self.status.state != state {
            match &why {
                Some(why) => tracing::warn!(machine = self.status.machine, state, "{why}"),
                None => tracing::info!(machine = self.status.machine, state, "the machine's protection"),
            }
        }
        self.status.state = state.to_owned();
        self.status.why = why;
    }

    /// What it writes to that is in none of its epochs.
    fn writes_to(&mut self, elsewhere: Vec<String>) {
        if self.status.elsewhere != elsewhere && !elsewhere.is_empty() {
            tracing::warn!(
                machine = self.status.machine,
                "not in its live, and so in none of its epochs, is what it writes to: {}",
                elsewhere.join(", ")
            );
        }
        self.status.elsewhere = elsewhere;
    }

    fn captured(&mut self, capture: &Capture) {
        capture.how.clone_into(&mut self.status.how);
        self.status.pause_parts_ms = capture.parts.iter().map(|(name, time)| ((*name).to_owned(), ms(*time))).collect();
        self.status.prepared_ms = ms(capture.prepared);
        self.pauses.add(capture.pause, &mut self.status);
    }

    fn decided(&mut self, decision: &Decision) {
        self.status.interval_ms = ms(decision.interval);
        self.status.limit = Some(decision.limit);
        decision.limit.reason().clone_into(&mut self.status.reason);
        self.status.meets_rpo = decision.meets_rpo;
    }
}

/// What a capture cost the machine, and how much of that because of what it had written.
fn lost(capture: &Capture, stored: &Stored) -> (Duration, Duration) {
    let pages = u32::try_from(stored.changed_pages).unwrap_or(u32::MAX);
    let by_pages = capture.prepared.mul_f64(PREPARING) + PAGE_AGAIN.saturating_mul(pages);
    (capture.pause + by_pages, by_pages)
}

/// Protects a machine until `stop` is closed, or until there was one epoch with `once`; returns how it is then. `tell` is
/// called with whatever is new, and every second.
pub fn protect(
    mut protection: Protection,
    once: bool,
    stop: &Receiver<()>,
    tell: &mut dyn FnMut(&ProtectionStatus),
) -> Result<ProtectionStatus> {
    let mut run = Run {
        status: ProtectionStatus {
            machine: protection.machine.clone(),
            rpo_ms: protection.policy.target().rpo.map(ms),
            state: "starting".to_owned(),
            ..ProtectionStatus::default()
        },
        newest: None,
        pauses: Pauses::default(),
        is_missed: false,
        tell,
    };
    let result = run_until_stopped(&mut protection, once, stop, &mut run);
    protection.host.leave(&protection.machine);
    let why = result.as_ref().err().map(ToString::to_string);
    run.is("ended", why);
    run.tell();
    result.map(|()| run.status)
}

fn run_until_stopped(protection: &mut Protection, once: bool, stop: &Receiver<()>, run: &mut Run<'_>) -> Result<()> {
    let mut moment = 0;
    let mut interval = Duration::ZERO;
    let mut begun = Stopwatch::start();
    while !waits(begun, interval, stop, run) {
        begun = Stopwatch::start();
        match protection.agent.health() {
            Health::Running => {}
            Health::Idle(why) if once => {
                return Err(Error::conflict(format!("{} does not run: it is {why}", protection.machine)));
            }
            Health::Lost(why) if once => return Err(Error::new(Kind::Io, why)),
            Health::Idle(why) => {
                run.is("idle", Some(format!("the machine does not run: it is {why}")));
                run.tell();
                interval = LOOK_INTERVAL;
                continue;
            }
            Health::Lost(why) => {
                run.is("lost", Some(why));
                run.tell();
                interval = LOOK_INTERVAL;
                continue;
            }
        }
        if let Some(heartbeat) = protection.heartbeat.as_mut().filter(|_| !once) {
            let (age, why) = heartbeat.look();
            run.status.beat_age_ms = Some(ms(age));
            if why.is_some() {
                // The newest epochs stay those of a guest that was alive.
                run.is("silent", why);
                run.tell();
                interval = LOOK_INTERVAL;
                continue;
            }
        }
        moment += 1;
        run.writes_to(protection.agent.elsewhere());
        // From here on nobody else is to make an epoch, however long the first one takes.
        run.tell();
        let (seen, result) = checkpoint(protection, moment, stop, run);
        let seen = Observation { host_load: host_load(), ..seen };
        run.status.host_load = seen.host_load;
        protection.policy.observe(&seen);
        match result {
            Ok(()) => run.is("protected", None),
            Err(error) if is_final(&error) => {
                // Two of it must not run. Whoever owns it now has the newest epoch, and this one can add nothing to it.
                if let Err(failed) = protection.agent.fence() {
                    tracing::error!(machine = protection.machine, "it may run twice: {failed}");
                }
                return Err(error);
            }
            Err(error) if once => return Err(error),
            Err(error) => {
                run.status.failures += 1;
                run.is("failing", Some(error.to_string()));
            }
        }
        if once {
            return Ok(());
        }
        let share = protection.host.share(&protection.machine, &protection.policy, protection.weight);
        let decision = protection.policy.decide(share);
        run.decided(&decision);
        interval = decision.interval;
        run.status.overhead = seen.lost.as_secs_f64() / interval.max(begun.elapsed()).as_secs_f64();
        run.tell();
    }
    Ok(())
}

/// Whoever has taken the machine over protects it now.
fn is_final(error: &Error) -> bool {
    matches!(error.kind(), Kind::Fenced)
}

/// Waits until an interval since a moment is over. `true`: it was told to stop.
fn waits(since: Stopwatch, interval: Duration, stop: &Receiver<()>, run: &mut Run<'_>) -> bool {
    loop {
        let left = interval.saturating_sub(since.elapsed());
        match stop.recv_timeout(left.min(LOOK_INTERVAL)) {
            Err(RecvTimeoutError::Timeout) if left <= LOOK_INTERVAL => return false,
            Err(RecvTimeoutError::Timeout) => run.tell(),
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return true,
        }
    }
}

/// One epoch: what it cost, and what became of it.
fn checkpoint(
    protection: &mut Protection,
    moment: u64,
    stop: &Receiver<()>,
    run: &mut Run<'_>,
) -> (Observation, Result<()>) {
    let mut frozen = None;
    let captured = {
        let Protection { epochs, outputs, .. } = protection;
        protection.agent.capture(&mut || {
            // An epoch of which nobody knows what was said before it explains nothing.
            outputs.as_mut().map_or(Ok(()), |outputs| outputs.frozen(moment))?;
            frozen = Some((epochs.freeze()?, Stopwatch::start()));
            Ok(())
        })
    };
    if let Ok(capture) = &captured {
        run.captured(capture);
    }
    let capture = captured.as_ref().ok().cloned().unwrap_or_default();
    let failed = |error| {
        let (lost, lost_by_pages) = lost(&capture, &Stored::default());
        (Observation { lost, lost_by_pages, failed: true, ..Observation::default() }, Err(error))
    };
    // An epoch that was begun is one, even if the machine was slow to go on.
    let Some((ticket, since)) = frozen else {
        return failed(captured.err().unwrap_or_else(|| Error::new(Kind::Io, "nothing was frozen")));
    };
    let stood_still = protection.agent.stood_still();
    // Whoever does not wait for it any more says why.
    let _ = ticket.stood_still.send(stood_still);
    let stored = match durable(&ticket, stop, run) {
        Ok(stored) => stored,
        Err(error) if stood_still => return failed(error),
        Err(error) => return failed(captured.err().unwrap_or(error)),
    };
    if let Some(Err(error)) = protection.outputs.as_mut().map(|outputs| outputs.durable(moment)) {
        // What was said stays held until the next one.
        tracing::error!(machine = run.status.machine, "what it said before its newest epoch is not let out: {error}");
    }
    run.newest = Some(since);
    let durable_after = since.elapsed();
    run.status.newest_epoch = Some(stored.epoch);
    run.status.epochs += 1;
    run.status.durable_ms = ms(durable_after);
    (run.status.changed_pages, run.status.stored_bytes) = (stored.changed_pages, stored.stored_bytes);
    let (lost, lost_by_pages) = lost(&capture, &stored);
    run.status.room_bytes = stored.room;
    let (stored_bytes, room) = (stored.stored_bytes, stored.room);
    let seen = Observation { lost, lost_by_pages, durable_after, stored_bytes, room, ..Observation::default() };
    (seen, captured.map(|_| ()))
}

/// Waits until an epoch is durable; not for ever when it is told to stop.
fn durable(ticket: &Ticket, stop: &Receiver<()>, run: &mut Run<'_>) -> Result<Stored> {
    let mut patience = STOP_PATIENCE;
    loop {
        match ticket.done.recv_timeout(LOOK_INTERVAL) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Timeout) if patience == 0 => {
                return Err(Error::new(Kind::Io, "told to stop before the epoch was durable: it may still become so"));
            }
            Err(RecvTimeoutError::Timeout) => {
                patience -= u32::from(!matches!(stop.try_recv(), Err(TryRecvError::Empty)));
                run.is("storing", Some("the store takes long; nothing new is captured meanwhile".to_owned()));
                run.tell();
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::new(Kind::Io, "the daemon went away before the epoch was durable"));
            }
        }
    }
}
