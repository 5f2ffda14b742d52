//! A host's lease: until when it may run what it owns, told by the process that renews it to all that must heed it.
//!
//! The rule, of which `ARCHITECTURE.md` has the proof:
//! - a lease runs from the moment *before* the request began by which it was renewed, on the clock of its host;
//! - what runs under it has ended a margin before it is over;
//! - whoever would take over waits for the lease and an allowance for clocks that run at different rates, from when it
//!   first saw the last renewal, on its own clock.
//!
//! The file is written by one process, and read by guards that act when it is not written any more: whoever is stopped,
//! hangs or is killed renews nothing.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::clock::Clock;
use crate::error::{Error, Result};

/// The lease's file in the directory where a host keeps what belongs to a repository.
const FILE: &str = "lease";
const MAGIC: [u8; 8] = *b"EPFSLEAS";
/// Magic, boot, three times in nanoseconds, checksum.
const FILE_LEN: usize = 8 + 16 + 3 * 8 + 4;

/// A file that is just being written is read again so often.
const READ_TRIES: u32 = 10;

/// How much longer than a lease others wait, beside a share of it.
const DRIFT: Duration = Duration::from_millis(500);

/// A lease as it was renewed last, in this host's time since it was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseState {
    /// Before the last renewal was asked for.
    pub renewed: Duration,
    /// From here on there was no moment without a lease.
    pub unbroken_since: Duration,
    pub lease: Duration,
}

impl LeaseState {
    pub fn ends(&self) -> Duration {
        self.renewed + self.lease
    }

    pub fn is_in_force(&self, now: Duration) -> bool {
        now < self.ends()
    }
}

/// What runs under a lease ends so long before it is over.
pub fn margin(lease: Duration) -> Duration {
    (lease / 10).clamp(Duration::from_millis(100), Duration::from_secs(1)).min(lease / 2)
}

/// For how long somebody else must have seen a host say nothing new before he may take over what it owns: the lease, a
/// hundredth of it for clocks that run at different rates, and half a second.
pub fn silence_needed(lease: Duration) -> Duration {
    lease + lease / 100 + DRIFT
}

/// Keeps a lease: what it is after each renewal.
#[derive(Clone, Copy, Debug)]
pub struct Renewals {
    lease: Duration,
    state: Option<LeaseState>,
}

impl Renewals {
    /// One that goes on from what an earlier process of this host renewed, if that is still in force.
    pub fn new(lease: Duration, before: Option<LeaseState>) -> Self {
        Self { lease, state: before.filter(|before| before.lease == lease) }
    }

    /// A renewal that was asked for at `began` was acknowledged at `acknowledged`.
    pub fn renewed(&mut self, began: Duration, acknowledged: Duration) -> LeaseState {
        let fresh = LeaseState { renewed: began, unbroken_since: acknowledged, lease: self.lease };
        let state = match self.state {
            // What was there before lasted until this one came.
            Some(before) if before.is_in_force(acknowledged) => LeaseState {
                renewed: before.renewed.max(began),
                unbroken_since: before.unbroken_since.min(acknowledged),
                ..fresh
            },
            _ => fresh,
        };
        self.state = Some(state);
        state
    }

    pub fn state(&self) -> Option<LeaseState> {
        self.state
    }
}

/// What something runs under: a lease that was in force without a break since the term was taken in which it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseClaim {
    pub file: PathBuf,
    pub lease: Duration,
    pub margin: Duration,
    /// Before the term was taken.
    pub since: Duration,
}

impl LeaseClaim {
    /// Under the lease of the host that keeps its state in a directory, in a term that was asked for at `since`.
    pub fn new(directory: &Path, lease: Duration, since: Duration) -> Self {
        Self { file: LeaseFile::path_in(directory), lease, margin: margin(lease), since }
    }

    /// Where the host keeps what belongs to the repository.
    pub fn directory(&self) -> &Path {
        self.file.parent().unwrap_or(Path::new("/"))
    }
}

/// How long something may still run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// At least so long, if nothing else is heard.
    Left(Duration),
    /// Not any more, and never again under this claim.
    Over,
}

/// Follows a claim. What it heard last counts until it hears something else, whatever becomes of the file.
#[derive(Clone, Debug)]
pub struct ClaimWatch {
    claim: LeaseClaim,
    end: Duration,
}

impl ClaimWatch {
    /// Begins with a lease that must be in force.
    pub fn new(claim: LeaseClaim) -> Self {
        Self { claim, end: Duration::ZERO }
    }

    pub fn claim(&self) -> &LeaseClaim {
        &self.claim
    }

    /// What follows from what was heard, at a moment.
    pub fn heard(&mut self, state: Option<LeaseState>, now: Duration) -> Verdict {
        if let Some(state) = state {
            // After a break somebody else may have taken over, and given it back.
            if state.lease != self.claim.lease || state.unbroken_since > self.claim.since {
                return Verdict::Over;
            }
            self.end = self.end.max(state.ends().saturating_sub(self.claim.margin));
        }
        match self.end.checked_sub(now) {
            Some(left) if !left.is_zero() => Verdict::Left(left),
            _ => Verdict::Over,
        }
    }
}

/// The file.
pub struct LeaseFile {
    file: File,
    path: PathBuf,
    boot: [u8; 16],
}

impl LeaseFile {
    /// Where a host's lease is told, in the directory where it keeps what belongs to a repository.
    pub fn path_in(directory: &Path) -> PathBuf {
        directory.join(FILE)
    }

    /// Opens it to tell a lease, which is as it was before until then.
    pub fn create(directory: &Path) -> Result<Self> {
        let path = Self::path_in(directory);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| Error::io(format!("cannot make {}", path.display()), error))?;
        Ok(Self { file, path, boot: boot_id()? })
    }

    /// Opens it to hear of a lease; `None` where none was ever told.
    pub fn open(path: &Path) -> Result<Option<Self>> {
        match File::open(path) {
            Ok(file) => Ok(Some(Self { file, path: path.to_owned(), boot: boot_id()? })),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(format!("cannot open {}", path.display()), error)),
        }
    }

    pub fn tell(&self, state: &LeaseState) -> Result<()> {
        let mut bytes = Vec::with_capacity(FILE_LEN);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&self.boot);
        for time in [state.renewed, state.unbroken_since, state.lease] {
            bytes.extend_from_slice(&u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).to_le_bytes());
        }
        let check = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&check.to_le_bytes());
        self.file
            .write_all_at(&bytes, 0)
            .map_err(|error| Error::io(format!("cannot write {}", self.path.display()), error))
    }

    /// What was told last since this host was started; `None` if nothing was.
    pub fn hear(&self) -> Result<Option<LeaseState>> {
        for _ in 0..READ_TRIES {
            let mut bytes = [0; FILE_LEN];
            let mut count = 0;
            while count < FILE_LEN {
                match self.file.read_at(&mut bytes[count..], count as u64) {
                    Ok(0) => return Ok(None),
                    Ok(more) => count += more,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(Error::io(format!("cannot read {}", self.path.display()), error)),
                }
            }
            let (body, check) = bytes.split_at(FILE_LEN - 4);
            if crc32c::crc32c(body).to_le_bytes() == check {
                return Ok(self.parse(body));
            }
        }
        Err(Error::damaged(format!("{} is not what was written there", self.path.display())))
    }

    fn parse(&self, body: &[u8]) -> Option<LeaseState> {
        let time = |at: usize| {
            let bytes = body[24 + 8 * at..][..8].try_into().unwrap_or_default();
            Duration::from_nanos(u64::from_le_bytes(bytes))
        };
        let is_of_this_boot = body[..8] == MAGIC && body[8..24] == self.boot;
        is_of_this_boot.then(|| LeaseState { renewed: time(0), unbroken_since: time(1), lease: time(2) })
    }
}

/// The lease that this host tells of, if it has one that is in force.
pub fn lease_of_host(directory: &Path, clock: &dyn Clock) -> Result<Option<LeaseState>> {
    let Some(file) = LeaseFile::open(&LeaseFile::path_in(directory))? else { return Ok(None) };
    let Some(state) = file.hear()? else { return Ok(None) };
    match state.is_in_force(clock.elapsed()) {
        true => Ok(Some(state)),
        false => Err(Error::conflict("this host's lease is over, and what it owns may be taken over by another")
            .hint("`epochfs status` shows its daemon, which must reach the repository; mount again where none runs")),
    }
}

/// Calls `over` once a claim is over, and returns; or returns when `ended` says so, which is asked all the while. What is
/// read comes from a thread of its own: a disk that does not answer must not keep anybody alive.
pub fn watch_claim(claim: LeaseClaim, clock: &Arc<dyn Clock>, ended: &dyn Fn() -> bool, over: &dyn Fn()) -> Result<()> {
    let look = (claim.lease / 50).clamp(Duration::from_millis(5), Duration::from_millis(50));
    let (sender, heard) = crossbeam_channel::bounded(1);
    let (path, of_thread) = (claim.file.clone(), clock.clone());
    std::thread::Builder::new()
        .name("lease".into())
        .spawn(move || {
            let mut file = None;
            loop {
                if file.is_none() {
                    file = LeaseFile::open(&path).ok().flatten();
                }
                // Without news the old ones count until they are over.
                let news = file.as_ref().and_then(|file| file.hear().ok().flatten());
                if let Some(state) = news
                    && sender.send(state).is_err()
                {
                    return;
                }
                of_thread.sleep(look);
            }
        })
        .map_err(|error| Error::io("cannot start a thread", error))?;
    let mut watch = ClaimWatch::new(claim);
    // The first news may take a moment.
    let mut state = heard.recv_timeout(watch.claim.lease).ok();
    loop {
        match watch.heard(state, clock.elapsed()) {
            Verdict::Over => {
                over();
                return Ok(());
            }
            Verdict::Left(left) => {
                state = heard.recv_timeout(left.min(look)).ok();
            }
        }
        if ended() {
            return Ok(());
        }
    }
}

fn boot_id() -> Result<[u8; 16]> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(PATH).map_err(|error| Error::io(format!("cannot read {PATH}"), error))?;
    epochfs_format::parse_id(&text.trim().replace('-', ""))
        .ok_or_else(|| Error::damaged(format!("{PATH} holds {:?}", text.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn claim(since: u64) -> LeaseClaim {
        LeaseClaim { file: PathBuf::new(), lease: s(5), margin: s(1), since: s(since) }
    }

    #[test]
    fn a_lease_runs_from_before_the_renewal_and_breaks_where_none_came_in_time() {
        let mut renewals = Renewals::new(s(5), None);
        let first = renewals.renewed(s(10), s(12));
        assert_eq!(first, LeaseState { renewed: s(10), unbroken_since: s(12), lease: s(5) });
        assert!(first.is_in_force(s(14)) && !first.is_in_force(s(15)));
        let second = renewals.renewed(s(13), s(14));
        assert_eq!((second.renewed, second.unbroken_since), (s(13), s(12)));
        // Acknowledged when the one before was over already.
        let third = renewals.renewed(s(17), s(18));
        assert_eq!((third.renewed, third.unbroken_since), (s(17), s(18)));
        // One that took longer than the lease is worth nothing, and neither is what came before it.
        let late = renewals.renewed(s(20), s(26));
        assert!(!late.is_in_force(s(26)));
        assert_eq!(renewals.renewed(s(26), s(27)).unbroken_since, s(27));
        // A process that takes over from another of the same host goes on, unless the lease is another.
        let mut next = Renewals::new(s(5), Some(third));
        assert_eq!(next.renewed(s(19), s(20)).unbroken_since, s(18));
        assert_eq!(Renewals::new(s(6), Some(third)).state(), None);
    }

    #[test]
    fn a_claim_is_over_a_margin_before_the_lease_and_after_any_break() {
        let state = |renewed, unbroken| LeaseState { renewed: s(renewed), unbroken_since: s(unbroken), lease: s(5) };
        let mut watch = ClaimWatch::new(claim(12));
        assert_eq!(watch.heard(Some(state(10, 12)), s(12)), Verdict::Left(s(2)));
        // What was heard counts while nothing else is.
        assert_eq!(watch.heard(None, s(13)), Verdict::Left(s(1)));
        assert_eq!(watch.heard(None, s(14)), Verdict::Over);
        let mut watch = ClaimWatch::new(claim(12));
        assert_eq!(watch.heard(Some(state(13, 11)), s(14)), Verdict::Left(s(3)));
        assert_eq!(watch.heard(Some(state(20, 19)), s(21)), Verdict::Over, "it was broken meanwhile");
        let other = LeaseState { lease: s(9), ..state(13, 11) };
        assert_eq!(ClaimWatch::new(claim(12)).heard(Some(other), s(14)), Verdict::Over, "of another length");
        assert_eq!(ClaimWatch::new(claim(12)).heard(None, s(0)), Verdict::Over, "nothing was ever heard");
    }

    #[test]
    fn what_is_told_is_heard_and_what_is_torn_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let path = LeaseFile::path_in(dir.path());
        assert!(LeaseFile::open(&path).unwrap().is_none());
        let writer = LeaseFile::create(dir.path()).unwrap();
        let reader = LeaseFile::open(&path).unwrap().unwrap();
        assert_eq!(reader.hear().unwrap(), None);
        let state = LeaseState { renewed: Duration::from_nanos(123), unbroken_since: s(1), lease: s(5) };
        writer.tell(&state).unwrap();
        assert_eq!(reader.hear().unwrap(), Some(state));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[30] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert!(reader.hear().is_err());
        // What another boot told is nothing.
        writer.tell(&state).unwrap();
        let other = LeaseFile { boot: [0; 16], ..LeaseFile::open(&path).unwrap().unwrap() };
        assert_eq!(other.hear().unwrap(), None);
    }

    #[test]
    fn others_wait_for_longer_than_the_lease() {
        assert_eq!(silence_needed(s(5)), Duration::from_millis(5550));
        assert_eq!(margin(s(5)), Duration::from_millis(500));
        assert_eq!(margin(Duration::from_millis(100)), Duration::from_millis(50));
        assert_eq!(margin(s(60)), s(1));
    }
}
