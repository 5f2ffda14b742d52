//! For how long hosts have said nothing new, on this observer's own clock: the rule, without any I/O.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::platform::lease::silence_needed;

/// What was seen of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    /// Its newest heartbeat's number; `None` where it has none.
    number: Option<u64>,
    /// When that was seen first: after the answer came that told of it.
    since: Duration,
    /// How often it was looked at since, by looks that succeeded.
    looks: u32,
}

/// So often a host must have been looked at while it said nothing new, before it is taken for silent: an observer that
/// stood still, or could not reach the repository, knows nothing about others.
const LOOKS_NEEDED: u32 = 3;

/// What an observer knows.
#[derive(Clone, Debug, Default)]
pub struct Silence {
    seen: BTreeMap<[u8; 16], Seen>,
}

impl Silence {
    /// A look at all hosts, whose answer came at `answered`. Those that are not in it have no heartbeat any more.
    pub fn looked(&mut self, newest: &BTreeMap<[u8; 16], u64>, answered: Duration) {
        for (host, seen) in &mut self.seen {
            note(seen, newest.get(host).copied(), answered);
        }
        for (host, number) in newest {
            let fresh = Seen { number: Some(*number), since: answered, looks: 0 };
            self.seen.entry(*host).or_insert(fresh);
        }
    }

    /// One host more that is watched, though it may never have said anything.
    pub fn watch(&mut self, host: [u8; 16], answered: Duration) {
        self.seen.entry(host).or_insert(Seen { number: None, since: answered, looks: 0 });
    }

    /// A look failed, or was too late: what others did meanwhile is not known. Who was not heard of since is given all the
    /// time again.
    pub fn missed(&mut self, now: Duration) {
        for seen in self.seen.values_mut() {
            (seen.since, seen.looks) = (now, 0);
        }
    }

    /// For how long a host has said nothing new.
    pub fn for_how_long(&self, host: &[u8; 16], now: Duration) -> Option<Duration> {
        self.seen.get(host).map(|seen| now.saturating_sub(seen.since))
    }

    /// The newest heartbeat that was seen of a host.
    pub fn number(&self, host: &[u8; 16]) -> Option<u64> {
        self.seen.get(host)?.number
    }

    /// Whether a host's machines with such a lease may be taken over, if a look that begins *now* finds nothing new.
    pub fn may_take_over(&self, host: &[u8; 16], lease: Duration, now: Duration) -> bool {
        let seen = self.seen.get(host);
        seen.is_some_and(|seen| now.saturating_sub(seen.since) >= silence_needed(lease) && seen.looks >= LOOKS_NEEDED)
    }
}

fn note(seen: &mut Seen, number: Option<u64>, answered: Duration) {
    if seen.number == number {
        seen.looks = seen.looks.saturating_add(1);
    } else {
        *seen = Seen { number, since: answered, looks: 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: [u8; 16] = [7; 16];

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn silence_counts_from_the_first_sight_of_the_newest_heartbeat() {
        let mut silence = Silence::default();
        let lease = ms(5000);
        let look = |number: u64| BTreeMap::from([(HOST, number)]);
        silence.looked(&look(7), ms(1000));
        for at in [2000, 3000, 4000] {
            silence.looked(&look(7), ms(at));
        }
        assert!(!silence.may_take_over(&HOST, lease, ms(1000 + 5549)));
        assert!(silence.may_take_over(&HOST, lease, ms(1000 + 5550)));
        silence.looked(&look(8), ms(5000));
        assert!(!silence.may_take_over(&HOST, lease, ms(10_000)));
        // None at all is a change too.
        silence.looked(&BTreeMap::new(), ms(9000));
        assert_eq!((silence.number(&HOST), silence.for_how_long(&HOST, ms(9500))), (None, Some(ms(500))));
        assert!(!silence.may_take_over(&[8; 16], lease, ms(1 << 40)), "it was never looked for");
    }

    #[test]
    fn who_stood_still_himself_knows_nothing() {
        let mut silence = Silence::default();
        let look = BTreeMap::from([(HOST, 7)]);
        silence.looked(&look, ms(0));
        assert!(!silence.may_take_over(&HOST, ms(5000), ms(60_000)), "it was looked at once");
        (1..=3).for_each(|at| silence.looked(&look, ms(at * 1000)));
        silence.missed(ms(4000));
        (5..=8).for_each(|at| silence.looked(&look, ms(at * 1000)));
        assert!(!silence.may_take_over(&HOST, ms(5000), ms(9549)));
        assert!(silence.may_take_over(&HOST, ms(5000), ms(9550)));
    }
}
