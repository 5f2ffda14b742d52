//! How often a machine is checkpointed: a pure function of what its checkpoints cost so far.
//!
//! A machine loses what it did since the newest durable epoch. So an epoch is begun as often as its target asks for, and
//! never more often than it may: a share of the machine's time, the store's speed, its bytes and its room, and what else the
//! host has to do each set the shortest interval they allow, and the longest of these holds. It grows at once, and shrinks by steps, and only for a reason.

use std::time::Duration;

/// No machine is checkpointed more often.
const INTERVAL_MIN: Duration = Duration::from_millis(20);

/// Where nothing else is asked for.
const INTERVAL_USUAL: Duration = Duration::from_secs(1);

/// An interval is at least so many times the time that an epoch takes until it is durable: none waits for another.
const STORE_ROOM: f64 = 1.25;

/// The interval shrinks by this at most from one checkpoint to the next, and not for less than a fifth.
const SHRINKS_TO: f64 = 0.5;
const SHRINKS_FROM: f64 = 0.8;

/// How much of an old figure is left when a smaller one is measured. Larger ones count at once.
const MEMORY: f64 = 0.5;

/// The room that commits leave is not used up sooner than in this time, however little there is: as it shrinks, less of it is
/// used, so that it never ends.
const ROOM_LASTS: Duration = Duration::from_secs(600);

/// A host with more than so many threads that want to run, for each processor, has more to do than it can: what is done for
/// protection makes it slower still.
const LOAD_BORNE: f64 = 1.5;

/// How much sooner than the target's an epoch is begun, for what is not foreseen.
const RPO_MARGIN: f64 = 0.9;

/// After failures in a row the interval is this at most, unless it is longer anyway.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Where longer intervals cost nearly in proportion, as a machine goes on writing to other pages, the interval is made so
/// many times longer: at last it writes to the same ones again. There is an end to it.
const GROWS_BY: f64 = 4.0;
const INTERVAL_MAX: Duration = Duration::from_secs(600);

/// What is asked of a machine's protection.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// As often as this, whatever it costs; only the store may delay it.
    pub fixed: Option<Duration>,
    /// At most so much work may be lost.
    pub rpo: Option<Duration>,
    /// The share of the machine's time that may be spent on it.
    pub overhead: f64,
    /// Bytes a second that may be stored.
    pub store_rate: Option<u64>,
}

impl Default for Target {
    fn default() -> Self {
        Self { fixed: None, rpo: None, overhead: 0.05, store_rate: None }
    }
}

/// What a checkpoint turned out to cost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Observation {
    /// Time that the machine stood still, or was slowed down; and how much of that there would not have been if it
    /// had written to nothing.
    pub lost: Duration,
    pub lost_by_pages: Duration,
    /// From the moment of the epoch until it was durable.
    pub durable_after: Duration,
    pub stored_bytes: u64,
    pub failed: bool,
    /// Threads that want to run on this host, for each processor.
    pub host_load: f64,
    /// Bytes that commits may still take in the store, where it has an end.
    pub room: Option<u64>,
}

/// What sets an interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// What was asked for.
    Target,
    /// The share of the machine's time.
    Overhead,
    /// The share of its host's.
    Host,
    /// How long an epoch takes until it is durable.
    Store,
    /// The bytes that may be stored.
    StoreRate,
    /// The bytes that its host may store.
    HostStoreRate,
    /// The room that the store has left.
    Room,
    /// What else this host has to do.
    HostLoad,
    /// Checkpoints that failed.
    Failures,
}

impl Limit {
    /// Why, for people.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Target => "as was asked for",
            Self::Overhead => "the machine would lose more of its time than it may",
            Self::Host => "this host's machines together would lose more of their time than they may",
            Self::Store => "an epoch takes that long until it is durable",
            Self::StoreRate => "more bytes would be stored than may be",
            Self::HostStoreRate => "this host's machines together would store more bytes than they may",
            Self::Room => "the store has little room left: prune and collect garbage, or give it more",
            Self::HostLoad => "this host has more to do than it can",
            Self::Failures => "checkpoints failed",
        }
    }
}

/// What a machine's host leaves to it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share {
    /// Of its time.
    pub time: f64,
    /// Bytes a second that may be stored.
    pub bytes: f64,
}

impl From<f64> for Share {
    /// A share of time, and as many bytes as it wants.
    fn from(time: f64) -> Self {
        Self { time, bytes: f64::INFINITY }
    }
}

/// When the next epoch is begun, and why not sooner.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    pub interval: Duration,
    pub limit: Limit,
    /// The most work that is lost if the machine fails at the worst moment.
    pub exposure: Duration,
    /// Whether that is within the target; nothing where there is none.
    pub meets_rpo: Option<bool>,
}

/// One machine's.
#[derive(Clone, Debug)]
pub struct Policy {
    target: Target,
    /// Seconds of the machine's time, of an epoch until it is durable, and its bytes; what is expected of the next one.
    lost: f64,
    durable: f64,
    bytes: f64,
    /// The bytes again without the first epoch's, which may hold the whole machine.
    changed_bytes: Option<f64>,
    /// What is expected of the host's load; and the room as it was last.
    load: f64,
    room: Option<u64>,
    failures: u32,
    /// The interval before this one.
    interval: Duration,
    /// The shortest that the shares of time allow, as it was decided last.
    paced: Duration,
    /// What the last checkpoint cost, and how much of that is because of the pages.
    last: (f64, f64),
}

/// A larger figure counts at once, a smaller one by and by: relief may be short.
fn expect(before: f64, now: f64) -> f64 {
    if now >= before { now } else { before * MEMORY + now * (1.0 - MEMORY) }
}

impl Policy {
    pub fn new(target: Target) -> Self {
        let interval = target.fixed.or(target.rpo.map(|rpo| rpo.mul_f64(RPO_MARGIN))).unwrap_or(INTERVAL_USUAL);
        Self {
            target,
            lost: 0.0,
            durable: 0.0,
            bytes: 0.0,
            changed_bytes: None,
            load: 0.0,
            room: None,
            failures: 0,
            interval: interval.max(INTERVAL_MIN),
            paced: Duration::ZERO,
            last: (0.0, 0.0),
        }
    }

    pub fn target(&self) -> &Target {
        &self.target
    }

    /// What a checkpoint costs the machine, as far as is known.
    pub fn cost(&self) -> Duration {
        Duration::from_secs_f64(self.lost)
    }

    /// What an epoch of it takes in the store, as far as is known: not the first one, which may hold the whole machine.
    pub fn bytes(&self) -> f64 {
        self.changed_bytes.unwrap_or(0.0)
    }

    pub fn observe(&mut self, seen: &Observation) {
        // What was lost was lost, whether or not an epoch came of it.
        self.lost = expect(self.lost, seen.lost.as_secs_f64());
        self.load = expect(self.load, seen.host_load);
        self.last = (seen.lost.as_secs_f64(), seen.lost_by_pages.min(seen.lost).as_secs_f64());
        if seen.failed {
            self.failures = self.failures.saturating_add(1);
            return;
        }
        self.failures = 0;
        self.durable = expect(self.durable, seen.durable_after.as_secs_f64());
        let bytes = seen.stored_bytes as f64;
        self.bytes = expect(self.bytes, bytes);
        self.changed_bytes = Some(self.changed_bytes.map_or(0.0, |before| expect(before, bytes)));
        self.room = seen.room;
    }

    /// The interval that is asked for.
    pub fn wanted(&self) -> Duration {
        let rpo =
            self.target.rpo.map(|rpo| rpo.mul_f64(RPO_MARGIN).saturating_sub(Duration::from_secs_f64(self.durable)));
        self.target.fixed.or(rpo).unwrap_or(INTERVAL_USUAL).max(INTERVAL_MIN)
    }

    /// The shortest interval that a share of the machine's time allows.
    ///
    /// What a checkpoint costs grows with the interval, by less and less. So a shorter interval is safe if it could bear what
    /// the last one cost; and a longer one if it can bear that its pages cost in proportion.
    fn pace(&self, share: f64) -> Duration {
        let (interval, (last, by_pages)) = (self.interval.as_secs_f64(), self.last);
        let needed = self.lost / share;
        let fixed = last - by_pages;
        let longer = match by_pages / interval {
            _ if last <= share * interval => needed,
            rate if rate < share => (fixed / (share - rate)).min(interval * GROWS_BY),
            _ => interval * GROWS_BY,
        };
        let paced = secs(needed.max(longer)).min(INTERVAL_MAX);
        match paced < self.paced {
            // A little less is no reason.
            true if paced >= self.paced.mul_f64(SHRINKS_FROM) => self.paced,
            true => paced.max(self.paced.mul_f64(SHRINKS_TO)),
            false => paced,
        }
    }

    /// When the next epoch is begun after the last one. `share` is what its host leaves to it.
    pub fn decide(&mut self, share: impl Into<Share>) -> Decision {
        let Share { time: share, bytes: host_rate } = share.into();
        let mut limits = vec![(self.wanted(), Limit::Target), (secs(self.durable * STORE_ROOM), Limit::Store)];
        if self.target.fixed.is_none() {
            let is_hosts = share < self.target.overhead;
            let paced = self.pace(share.min(self.target.overhead).max(1e-6));
            self.paced = paced;
            limits.push((paced, if is_hosts { Limit::Host } else { Limit::Overhead }));
            // A target that its shares of time allow is met on a busy host, too.
            if self.load > LOAD_BORNE && self.target.rpo.is_none() {
                limits.push((self.wanted().mul_f64((self.load / LOAD_BORNE).min(100.0)), Limit::HostLoad));
            }
        }
        if let (Some(room), Some(changed)) = (self.room, self.changed_bytes) {
            let lasts = secs(changed * ROOM_LASTS.as_secs_f64() / room.max(1) as f64);
            limits.push((lasts.min(INTERVAL_MAX), Limit::Room));
        }
        if let Some(rate) = self.target.store_rate {
            limits.push((secs(self.bytes / rate.max(1) as f64), Limit::StoreRate));
        }
        if host_rate.is_finite() {
            limits.push((secs(self.bytes() / host_rate.max(1.0)), Limit::HostStoreRate));
        }
        if self.failures > 0 {
            let wait = self.wanted().saturating_mul(1 << self.failures.min(10));
            limits.push((wait.min(RETRY_MAX), Limit::Failures));
        }
        let mut longest = limits[0];
        for limit in &limits[1..] {
            if limit.0 > longest.0 {
                longest = *limit;
            }
        }
        self.interval = longest.0;
        let exposure = self.interval + secs(self.durable);
        Decision {
            interval: self.interval,
            limit: longest.1,
            exposure,
            meets_rpo: self.target.rpo.map(|rpo| exposure <= rpo && self.failures == 0),
        }
    }
}

fn secs(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(INTERVAL_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn seen(lost: u32, durable_after: u32) -> Observation {
        let (lost, durable_after) = (MS * lost, MS * durable_after);
        Observation { lost, durable_after, stored_bytes: 1 << 20, ..Observation::default() }
    }

    fn settle(policy: &mut Policy, seen: &Observation) -> Decision {
        for _ in 0..100 {
            policy.observe(seen);
            policy.decide(1.0);
        }
        policy.decide(1.0)
    }

    #[test]
    fn a_target_that_can_be_met_is_met() {
        let mut policy = Policy::new(Target { rpo: Some(MS * 1000), ..Target::default() });
        let decision = settle(&mut policy, &seen(10, 50));
        assert_eq!((decision.limit, decision.meets_rpo), (Limit::Target, Some(true)));
        assert_eq!((decision.interval, decision.exposure), (MS * 850, MS * 900));
    }

    #[test]
    fn each_limit_holds_and_is_named() {
        let target = Target { rpo: Some(MS * 200), overhead: 0.1, ..Target::default() };
        let decision = settle(&mut Policy::new(target), &seen(100, 10));
        assert_eq!((decision.interval, decision.limit, decision.meets_rpo), (MS * 1000, Limit::Overhead, Some(false)));
        let decision = settle(&mut Policy::new(target), &seen(1, 2000));
        assert_eq!((decision.interval, decision.limit), (MS * 2500, Limit::Store));
        let rate = Target { store_rate: Some(1 << 18), ..target };
        let decision = settle(&mut Policy::new(rate), &seen(1, 1));
        assert_eq!((decision.interval, decision.limit), (MS * 4000, Limit::StoreRate));
        let mut policy = Policy::new(target);
        policy.observe(&seen(10, 1));
        assert_eq!(
            policy.decide(0.01),
            Decision { interval: MS * 1000, limit: Limit::Host, exposure: MS * 1001, meets_rpo: Some(false) }
        );
    }

    #[test]
    fn a_fixed_interval_is_delayed_by_the_store_alone() {
        let target = Target { fixed: Some(MS * 100), overhead: 0.01, ..Target::default() };
        let decision = settle(&mut Policy::new(target), &seen(50, 20));
        assert_eq!((decision.interval, decision.limit, decision.meets_rpo), (MS * 100, Limit::Target, None));
        assert_eq!(settle(&mut Policy::new(target), &seen(50, 400)).interval, MS * 500);
    }

    #[test]
    fn little_room_and_a_host_that_is_overloaded_are_heeded_and_named() {
        let target = Target { rpo: Some(MS * 1000), ..Target::default() };
        let usual = seen(1, 1);
        // The first epoch holds the whole machine: that says nothing of those to come.
        let mut policy = Policy::new(target);
        policy.observe(&Observation { stored_bytes: 1 << 30, room: Some(60 << 20), ..usual });
        assert_eq!(policy.decide(1.0).limit, Limit::Target);
        policy.observe(&Observation { room: Some(60 << 20), ..usual });
        assert_eq!((policy.decide(1.0).limit, policy.interval), (Limit::Room, MS * 10_000));
        // A MiB an epoch, and 60 of them left: one in ten seconds, so that they last for ten minutes.
        let decision = settle(&mut Policy::new(target), &Observation { room: Some(60 << 20), ..usual });
        assert_eq!((decision.interval, decision.limit, decision.meets_rpo), (MS * 10_000, Limit::Room, Some(false)));
        let decision = settle(&mut Policy::new(target), &Observation { room: Some(0), ..usual });
        assert_eq!((decision.interval, decision.limit), (INTERVAL_MAX, Limit::Room));
        let decision = settle(&mut Policy::new(target), &Observation { room: Some(1 << 40), ..usual });
        assert_eq!(decision.limit, Limit::Target);
        // Also where the interval is fixed: a full store has no epochs at all.
        let fixed = Target { fixed: Some(MS * 100), ..Target::default() };
        let decision = settle(&mut Policy::new(fixed), &Observation { room: Some(60 << 20), ..usual });
        assert_eq!(decision.limit, Limit::Room);
        // Three times as many threads as can be borne: a third of the epochs, where no target says otherwise.
        let busy = Observation { host_load: 4.5, ..usual };
        let decision = settle(&mut Policy::new(Target::default()), &busy);
        assert_eq!((decision.interval, decision.limit), (MS * 3000, Limit::HostLoad));
        for target in [target, fixed] {
            assert_eq!(settle(&mut Policy::new(target), &busy).limit, Limit::Target);
        }
        let idle = Observation { host_load: 1.4, ..usual };
        assert_eq!(settle(&mut Policy::new(Target::default()), &idle).limit, Limit::Target);
    }

    #[test]
    fn it_grows_at_once_and_shrinks_by_steps() {
        let mut policy = Policy::new(Target { rpo: Some(MS * 1000), ..Target::default() });
        settle(&mut policy, &seen(10, 0));
        policy.observe(&seen(200, 0));
        assert_eq!(policy.decide(1.0).interval, MS * 4000);
        policy.observe(&seen(10, 0));
        let decision = policy.decide(1.0);
        assert_eq!((decision.interval, decision.limit), (MS * 2100, Limit::Overhead));
        // A little less is no reason.
        let mut policy = Policy::new(Target { rpo: Some(MS * 100), ..Target::default() });
        assert_eq!(settle(&mut policy, &seen(50, 0)).interval, MS * 1000);
        assert_eq!(settle(&mut policy, &seen(45, 0)).interval, MS * 1000);
    }

    #[test]
    fn what_grows_with_the_interval_is_foreseen() {
        // 10 ms, and 40 ms for each second.
        let cost = |interval: Duration| Observation {
            lost: MS * 10 + interval.mul_f64(0.04),
            lost_by_pages: interval.mul_f64(0.04),
            ..Observation::default()
        };
        let mut policy = Policy::new(Target { rpo: Some(MS * 200), overhead: 0.06, ..Target::default() });
        policy.observe(&cost(MS * 180));
        // 500 ms cost 30 ms: 0.06 of them.
        let decision = policy.decide(1.0);
        assert!(decision.interval >= MS * 499 && decision.interval < MS * 510, "{decision:?}");
        // Nothing is enough for pages that cost more than is left: it grows by much, for it has to end somewhere.
        let mut policy = Policy::new(Target { rpo: Some(MS * 1000), overhead: 0.02, ..Target::default() });
        policy.observe(&cost(MS * 900));
        assert_eq!(policy.decide(1.0).interval, MS * 3600);
    }

    #[test]
    fn failures_in_a_row_are_repeated_less_and_less_often_and_then_all_is_as_before() {
        let mut policy = Policy::new(Target { rpo: Some(MS * 1000), ..Target::default() });
        let mut before = Duration::ZERO;
        for _ in 0..20 {
            policy.observe(&Observation { failed: true, ..Observation::default() });
            let decision = policy.decide(1.0);
            assert!(decision.interval >= before && decision.interval <= RETRY_MAX);
            assert_eq!((decision.limit, decision.meets_rpo), (Limit::Failures, Some(false)));
            before = decision.interval;
        }
        assert_eq!(before, RETRY_MAX);
        policy.observe(&seen(10, 0));
        assert_eq!((policy.decide(1.0).interval, policy.decide(1.0).meets_rpo), (MS * 900, Some(true)));
    }
}
