//! What hosts have left, and which machine is where: the state that planning changes.

use super::problem::{Item, Problem};
use super::situation::{HostState, Settings};

/// How a host is chosen for a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// Where it had better be, where its image is warm, and where most is left for each machine that is restarted there:
    /// for when there is room for all.
    Spread,
    /// Where the least is left, so that the rest stays in one piece for large machines: for when room is short.
    Pack,
}

#[derive(Clone)]
pub(super) struct Room {
    memory: Vec<u64>,
    cpus: Vec<u64>,
    /// Of each host, what a byte and a processor are of all it may give.
    per_byte: Vec<f64>,
    per_cpu: Vec<f64>,
    /// What a processor is worth, in bytes.
    bytes_per_cpu: f64,
    /// A bit for each group, for each host: whether it has a machine of that group.
    groups: Vec<u64>,
    words: usize,
    /// Where each machine is, and which ones a host has: those that may be moved, and those that may not.
    place: Vec<Option<u32>>,
    movable: Vec<Vec<u32>>,
    fixed: Vec<Vec<u32>>,
    /// Every change, so that it can be taken back.
    log: Vec<Change>,
}

#[derive(Clone, Copy)]
enum Change {
    Put(u32),
    Removed(u32, u32),
}

impl Change {
    fn item(self) -> u32 {
        match self {
            Self::Put(item) | Self::Removed(item, _) => item,
        }
    }
}

fn total(all: &[u64]) -> f64 {
    all.iter().map(|one| *one as f64).sum()
}

impl Room {
    pub(super) fn new(hosts: &[&HostState], items: usize, groups: usize, settings: &Settings) -> Self {
        let memory = hosts.iter().map(|host| {
            // A share that is no number keeps nothing free, and one beyond 1 everything.
            let headroom = (host.memory as f64 * settings.memory_headroom) as u64;
            host.memory_free.saturating_sub(headroom)
        });
        let cpus = hosts.iter().map(|host| {
            let all = (f64::from(host.cpus) * settings.cpu_overcommit) as u64;
            all.saturating_sub(u64::from(host.cpus_used))
        });
        let share = |whole: f64| if whole > 0.0 { 1.0 / whole } else { 0.0 };
        let words = groups.div_ceil(64);
        let (memory, cpus): (Vec<u64>, Vec<u64>) = (memory.collect(), cpus.collect());
        let (all_memory, all_cpus) = (total(&memory), total(&cpus));
        Self {
            memory,
            cpus,
            bytes_per_cpu: if all_cpus > 0.0 { all_memory / all_cpus } else { 0.0 },
            per_byte: hosts.iter().map(|host| share(host.memory as f64)).collect(),
            per_cpu: hosts.iter().map(|host| share(f64::from(host.cpus) * settings.cpu_overcommit)).collect(),
            groups: vec![0; words * hosts.len()],
            words,
            place: vec![None; items],
            movable: vec![Vec::new(); hosts.len()],
            fixed: vec![Vec::new(); hosts.len()],
            log: Vec::new(),
        }
    }

    /// What all hosts have left together, in bytes and processors.
    pub(super) fn totals(&self) -> (f64, f64) {
        (total(&self.memory), total(&self.cpus))
    }

    pub(super) fn memory(&self, host: u32) -> u64 {
        self.memory[host as usize]
    }

    pub(super) fn cpus(&self, host: u32) -> u64 {
        self.cpus[host as usize]
    }

    pub(super) fn place(&self, item: u32) -> Option<u32> {
        self.place[item as usize]
    }

    /// The machines on a host that may be moved.
    pub(super) fn movable(&self, host: u32) -> &[u32] {
        &self.movable[host as usize]
    }

    /// All machines on a host.
    pub(super) fn placed_on(&self, host: u32) -> impl Iterator<Item = u32> {
        self.movable[host as usize].iter().chain(&self.fixed[host as usize]).copied()
    }

    fn group_bit(&self, host: u32, group: u32) -> (usize, u64) {
        (host as usize * self.words + group as usize / 64, 1 << (group % 64))
    }

    pub(super) fn has_group(&self, host: u32, group: u32) -> bool {
        let (word, bit) = self.group_bit(host, group);
        self.groups[word] & bit != 0
    }

    pub(super) fn take_group(&mut self, host: u32, group: u32) {
        let (word, bit) = self.group_bit(host, group);
        self.groups[word] |= bit;
    }

    /// Puts a machine where it stays for good; `counts`, unless what it takes is missing there already.
    pub(super) fn fix(&mut self, item: &Item<'_>, number: u32, host: u32, counts: bool) {
        self.place[number as usize] = Some(host);
        self.fixed[host as usize].push(number);
        item.groups.iter().for_each(|group| self.take_group(host, *group));
        if counts {
            let at = host as usize;
            self.memory[at] = self.memory[at].saturating_sub(item.need.memory);
            self.cpus[at] = self.cpus[at].saturating_sub(u64::from(item.need.cpus));
        }
    }

    /// Whether a host that may have a machine has room for it.
    pub(super) fn fits(&self, item: &Item<'_>, host: u32) -> bool {
        self.memory[host as usize] >= item.need.memory
            && self.cpus[host as usize] >= u64::from(item.need.cpus)
            && !item.groups.iter().any(|group| self.has_group(host, *group))
    }

    pub(super) fn put(&mut self, problem: &Problem<'_>, number: u32, host: u32) {
        let item = &problem.items[number as usize];
        self.take(item, host);
        self.place[number as usize] = Some(host);
        self.movable[host as usize].push(number);
        self.log.push(Change::Put(number));
    }

    pub(super) fn remove(&mut self, problem: &Problem<'_>, number: u32) {
        if let Some(host) = self.place[number as usize].take() {
            self.give(&problem.items[number as usize], host);
            self.movable[host as usize].retain(|one| *one != number);
            self.log.push(Change::Removed(number, host));
        }
    }

    fn take(&mut self, item: &Item<'_>, host: u32) {
        let at = host as usize;
        self.memory[at] -= item.need.memory;
        self.cpus[at] -= u64::from(item.need.cpus);
        item.groups.iter().for_each(|group| self.take_group(host, *group));
    }

    fn give(&mut self, item: &Item<'_>, host: u32) {
        let at = host as usize;
        self.memory[at] += item.need.memory;
        self.cpus[at] += u64::from(item.need.cpus);
        for group in &item.groups {
            // It was put there while nobody else of its groups was.
            let (word, bit) = self.group_bit(host, *group);
            self.groups[word] &= !bit;
        }
    }

    /// How many changes were made.
    pub(super) fn changes(&self) -> usize {
        self.log.len()
    }

    /// The machines that were placed or moved since then, and where they are now.
    pub(super) fn changed_since(&self, changes: usize) -> Vec<(u32, Option<u32>)> {
        let mut changed: Vec<u32> = self.log[changes..].iter().map(|change| change.item()).collect();
        changed.sort_unstable();
        changed.dedup();
        changed.into_iter().map(|item| (item, self.place(item))).collect()
    }

    /// Makes these changes again, from the state in which they began.
    pub(super) fn repeat(&mut self, problem: &Problem<'_>, changed: &[(u32, Option<u32>)]) {
        changed.iter().for_each(|(item, _)| self.remove(problem, *item));
        for (item, host) in changed {
            if let Some(host) = host {
                self.put(problem, *item, *host);
            }
        }
    }

    /// Whether a host would have room for a machine if it had not that other one.
    pub(super) fn would_fit_without(&self, problem: &Problem<'_>, number: u32, host: u32, other: u32) -> bool {
        let (item, other) = (&problem.items[number as usize], &problem.items[other as usize]);
        self.memory(host) + other.need.memory >= item.need.memory
            && self.cpus(host) + u64::from(other.need.cpus) >= u64::from(item.need.cpus)
            && item.groups.iter().all(|group| !self.has_group(host, *group) || other.groups.contains(group))
    }

    /// Takes the changes after the first so many back.
    pub(super) fn undo_to(&mut self, problem: &Problem<'_>, changes: usize) {
        while self.log.len() > changes {
            match self.log.pop() {
                Some(Change::Put(number)) => {
                    if let Some(host) = self.place[number as usize].take() {
                        self.give(&problem.items[number as usize], host);
                        self.movable[host as usize].retain(|one| *one != number);
                    }
                }
                Some(Change::Removed(number, host)) => {
                    self.take(&problem.items[number as usize], host);
                    self.place[number as usize] = Some(host);
                    self.movable[host as usize].push(number);
                }
                None => {}
            }
        }
    }

    /// The host for a machine, if one has room.
    pub(super) fn choose(&self, problem: &Problem<'_>, number: u32, style: Style) -> Option<u32> {
        let item = &problem.items[number as usize];
        let kind = problem.kind(number);
        let mut warm = item.warm.as_slice();
        let mut best: Option<(u32, (bool, u64), f64)> = None;
        for &host in &kind.hosts {
            if !self.fits(item, host) {
                continue;
            }
            let at = host as usize;
            let (memory, cpus) = (self.memory[at] - item.need.memory, self.cpus[at] - u64::from(item.need.cpus));
            let left = match style {
                // A host restarts a few machines at a time: each gets as many as go with what it has left, so that all
                // hosts are done at about the same time.
                Style::Spread => {
                    let left = (memory as f64 * self.per_byte[at]).min(cpus as f64 * self.per_cpu[at]);
                    left / (1 + self.movable[at].len() + self.fixed[at].len()) as f64
                }
                Style::Pack => memory as f64 + cpus as f64 * self.bytes_per_cpu,
            };
            while warm.first().is_some_and(|(other, _)| *other < host) {
                warm = &warm[1..];
            }
            let units = warm.first().filter(|(other, _)| *other == host).map_or(0, |(_, units)| *units);
            let liked = (kind.preferred[at], units);
            let better = match (style, best) {
                (_, None) => true,
                (Style::Spread, Some((_, best, most))) => liked > best || liked == best && left > most,
                (Style::Pack, Some((_, best, least))) => left < least || left == least && liked > best,
            };
            if better {
                best = Some((host, liked, left));
            }
        }
        best.map(|(host, ..)| host)
    }
}
