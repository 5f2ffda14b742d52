//! Which epochs a policy keeps: a pure function of the epochs and the policy, by no clock but the epochs' own times.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::platform::clock;
/// How many of what to keep. An epoch stays if any rule keeps it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// The newest epochs.
    pub last: u64,
    /// Those that are at most so much older than the newest.
    pub within: Option<Duration>,
    /// The newest epoch of each of so many of the latest periods that have any, by the calendar in UTC.
    pub periods: BTreeMap<Period, u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Period {
    Second,
    Minute,
    Hour,
    Day,
    Week,
    Month,
    Year,
}

/// An epoch as far as retention needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dated {
    pub epoch: u64,
    pub time_ns: u64,
    /// What keeps it whatever the policy says: a tag, or somebody who uses it.
    pub pinned_by: Vec<String>,
}

/// What becomes of an epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    pub epoch: u64,
    pub time_ns: u64,
    pub kept: bool,
    /// Why it is kept.
    pub reasons: Vec<String>,
}

impl Policy {
    /// The newest `last`, those within a time, and the newest of each of so many seconds, minutes, hours, days, weeks, months and
    /// years.
    pub fn new(last: u64, within: Option<Duration>, counts: [u64; 7]) -> Self {
        Self { last, within, periods: Period::ALL.into_iter().zip(counts).collect() }
    }

    /// A policy without any rule would keep the newest epoch alone; nobody means that.
    pub fn is_empty(&self) -> bool {
        self.last == 0 && self.within.is_none() && self.periods.values().all(|count| *count == 0)
    }

    /// Judges all epochs of a machine. The newest always stays; epochs are judged from the newest to the oldest by
    /// number, for a number never lies about what came first.
    pub fn judge(&self, epochs: &[Dated]) -> Vec<Verdict> {
        let mut order: Vec<&Dated> = epochs.iter().collect();
        order.sort_by_key(|dated| std::cmp::Reverse(dated.epoch));
        let newest_ns = order.iter().map(|dated| dated.time_ns).max().unwrap_or(0);
        let mut left: BTreeMap<Period, (u64, Option<u64>)> =
            self.periods.iter().map(|(period, count)| (*period, (*count, None))).collect();
        let mut verdicts = Vec::with_capacity(order.len());
        for (at, dated) in order.iter().enumerate() {
            let mut reasons = Vec::new();
            if at == 0 {
                reasons.push("newest".to_owned());
            }
            if (at as u64) < self.last {
                reasons.push(format!("last {}", self.last));
            }
            let age = Duration::from_nanos(newest_ns - dated.time_ns);
            if self.within.is_some_and(|within| age <= within) {
                reasons.push("within".to_owned());
            }
            for (period, (count, last)) in &mut left {
                let number = period.number(dated.time_ns);
                if *count > 0 && *last != Some(number) {
                    *count -= 1;
                    *last = Some(number);
                    reasons.push(period.adverb().to_owned());
                }
            }
            reasons.extend(dated.pinned_by.iter().cloned());
            let kept = !reasons.is_empty();
            verdicts.push(Verdict { epoch: dated.epoch, time_ns: dated.time_ns, kept, reasons });
        }
        verdicts
    }
}

impl Period {
    const ALL: [Self; 7] = [Self::Second, Self::Minute, Self::Hour, Self::Day, Self::Week, Self::Month, Self::Year];

    pub fn adverb(self) -> &'static str {
        match self {
            Self::Second => "secondly",
            Self::Minute => "minutely",
            Self::Hour => "hourly",
            Self::Day => "daily",
            Self::Week => "weekly",
            Self::Month => "monthly",
            Self::Year => "yearly",
        }
    }

    /// The number of the period that a time is in. Weeks begin on Monday.
    pub fn number(self, time_ns: u64) -> u64 {
        let seconds = time_ns / 1_000_000_000;
        let days = seconds / 86_400;
        match self {
            Self::Second => seconds,
            Self::Minute => seconds / 60,
            Self::Hour => seconds / 3600,
            Self::Day => days,
            // 1970 began on a Thursday.
            Self::Week => (days + 3) / 7,
            Self::Month => {
                let (year, month) = year_and_month(days);
                year * 12 + month - 1
            }
            Self::Year => year_and_month(days).0,
        }
    }
}

/// The civil year and month of a day since 1970.
fn year_and_month(days: u64) -> (u64, u64) {
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // Whole eras of 400 years have the same number of days.
    let (mut year, mut rest) = (1970 + days / 146_097 * 400, days % 146_097);
    loop {
        let len = if is_leap(year) { 366 } else { 365 };
        if rest < len {
            break;
        }
        rest -= len;
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 1;
    for len in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if rest < len {
            break;
        }
        rest -= len;
        month += 1;
    }
    (year, month)
}

/// Reads a length of time: a whole number of seconds, minutes, hours, days, weeks or years, like 36h.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    const UNITS: &[(&str, u64)] = &[
        ("s", 1000),
        ("m", 60_000),
        ("h", 3_600_000),
        ("d", 24 * 3_600_000),
        ("w", 7 * 24 * 3_600_000),
        ("y", 365 * 24 * 3_600_000),
    ];
    clock::parse(text, UNITS)
        .ok_or_else(|| "a length of time is a number with s, m, h, d, w or y behind it, like 36h or 14d".to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DAY: u64 = 86_400;

    fn dated(epoch: u64, seconds: u64) -> Dated {
        Dated { epoch, time_ns: seconds * 1_000_000_000, pinned_by: Vec::new() }
    }

    fn kept(policy: &Policy, epochs: &[Dated]) -> Vec<u64> {
        policy.judge(epochs).into_iter().filter(|verdict| verdict.kept).map(|verdict| verdict.epoch).collect()
    }

    fn periods(all: &[(Period, u64)]) -> Policy {
        Policy { periods: all.iter().copied().collect(), ..Policy::default() }
    }

    #[test]
    fn the_calendar_is_right() {
        for (days, expected) in [
            (0, (1970, 1)),
            (58, (1970, 2)),
            (59, (1970, 3)),
            (364, (1970, 12)),
            (365, (1971, 1)),
            (11_016, (2000, 2)),
            (11_017, (2000, 3)),
            (20_513, (2026, 3)),
            (47_540, (2100, 2)),
            (47_541, (2100, 3)),
            (146_097 + 59, (2370, 3)),
        ] {
            assert_eq!(year_and_month(days), expected, "day {days}");
        }
        // 1970-01-05 was a Monday.
        assert_eq!(Period::Week.number(4 * DAY * 1_000_000_000), 1);
        assert_eq!(Period::Week.number((4 * DAY - 1) * 1_000_000_000), 0);
    }

    #[test]
    fn each_rule_keeps_what_it_says() {
        // Four a day for ten days.
        let epochs: Vec<Dated> = (0..40).map(|at| dated(at + 1, 100 * DAY + at * DAY / 4)).collect();
        assert_eq!(kept(&Policy { last: 3, ..Policy::default() }, &epochs), [40, 39, 38]);
        let within = Policy { within: Some(Duration::from_secs(DAY / 2)), ..Policy::default() };
        assert_eq!(kept(&within, &epochs), [40, 39, 38]);
        assert_eq!(kept(&periods(&[(Period::Day, 3)]), &epochs), [40, 36, 32]);
        assert_eq!(kept(&periods(&[(Period::Day, 2), (Period::Hour, 2)]), &epochs), [40, 39, 36]);
        // The tenth of April is day 99.
        assert_eq!(kept(&periods(&[(Period::Month, 9), (Period::Year, 9)]), &epochs), [40]);
        assert!(Policy::default().is_empty() && periods(&[(Period::Day, 0)]).is_empty());
    }

    #[test]
    fn what_is_pinned_and_the_newest_stay() {
        let mut epochs: Vec<Dated> = (1..=5).map(|epoch| dated(epoch, epoch)).collect();
        epochs[1].pinned_by.push("tag golden".into());
        let verdicts = periods(&[(Period::Year, 1)]).judge(&epochs);
        assert_eq!(verdicts[3].reasons, ["tag golden"]);
        assert_eq!(verdicts[0].reasons, ["newest", "yearly"]);
        assert_eq!(kept(&periods(&[(Period::Year, 1)]), &epochs), [5, 2]);
    }

    #[test]
    fn lengths_of_time_are_read() {
        assert_eq!(parse_duration("36h").unwrap(), Duration::from_secs(36 * 3600));
        assert_eq!(parse_duration("2w").unwrap(), Duration::from_secs(14 * DAY));
        for text in ["", "h", "3", "3x", "-1d", "1.5h", "99999999999999999999y", "9999999999999999y", "\u{fc}"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    fn any_policy() -> impl Strategy<Value = Policy> {
        let all =
            [Period::Second, Period::Minute, Period::Hour, Period::Day, Period::Week, Period::Month, Period::Year];
        let counts = prop::collection::vec(0..4_u64, all.len());
        (0..4_u64, prop::option::of(0..10_000_000_u64), counts).prop_map(move |(last, within, counts)| Policy {
            last,
            within: within.map(Duration::from_secs),
            periods: all.into_iter().zip(counts).collect(),
        })
    }

    fn any_epochs() -> impl Strategy<Value = Vec<Dated>> {
        prop::collection::vec((1..20_000_000_u64, prop::bool::weighted(0.1)), 1..60).prop_map(|steps| {
            let mut seconds = 1_700_000_000;
            let mut epochs = Vec::new();
            for (at, (step, pinned)) in steps.into_iter().enumerate() {
                seconds += step % if step % 3 == 0 { 100 } else { 10_000_000 };
                let mut one = dated(at as u64 + 1, seconds);
                one.pinned_by.extend(pinned.then(|| "tag".to_owned()));
                epochs.push(one);
            }
            epochs
        })
    }

    proptest! {
        #[test]
        fn a_policy_is_sound(policy in any_policy(), epochs in any_epochs()) {
            let verdicts = policy.judge(&epochs);
            prop_assert_eq!(verdicts.len(), epochs.len());
            let stays = kept(&policy, &epochs);
            // The newest and what is pinned.
            prop_assert_eq!(stays[0], epochs.len() as u64);
            prop_assert!(epochs.iter().all(|one| one.pinned_by.is_empty() || stays.contains(&one.epoch)));
            // No rule keeps more than its count, beyond what is asked of it at all.
            for (period, count) in &policy.periods {
                let by_rule = verdicts.iter().filter(|one| one.reasons.iter().any(|why| why == period.adverb()));
                prop_assert!(by_rule.count() as u64 <= *count);
            }
            // Each of the latest periods that have epochs keeps its newest one.
            for (period, count) in &policy.periods {
                let mut numbers: Vec<u64> = epochs.iter().map(|one| period.number(one.time_ns)).collect();
                numbers.dedup();
                for number in numbers.iter().rev().take(*count as usize) {
                    let newest = epochs.iter().rfind(|one| period.number(one.time_ns) == *number).unwrap();
                    prop_assert!(stays.contains(&newest.epoch));
                }
            }
            // What stays, stays when asked again.
            let rest: Vec<Dated> = epochs.iter().filter(|one| stays.contains(&one.epoch)).cloned().collect();
            prop_assert_eq!(kept(&policy, &rest), stays);
            // A looser policy keeps no less.
            let mut looser = policy.clone();
            looser.last += 1;
            looser.periods.values_mut().for_each(|count| *count += 1);
            let more = kept(&looser, &epochs);
            prop_assert!(kept(&policy, &epochs).iter().all(|epoch| more.contains(epoch)));
        }
    }
}
