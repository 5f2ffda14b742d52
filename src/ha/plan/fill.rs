//! Placing machines one after the other, the most urgent first, and moving placed ones about where that makes room.
//!
//! Urgent is who has a high priority, or is waited for by one who has. The machines of one urgency are placed the largest
//! first; if some are left out, it is tried with the smallest first as well, and whichever places more is kept. A machine
//! that waits for others has its turn when these are placed, and then before all that is less urgent.

use std::collections::BinaryHeap;

use super::problem::Problem;
use super::room::{Room, Style};

/// The order among machines of one urgency.
#[derive(Clone, Copy, PartialEq, Eq)]
enum First {
    Largest,
    Smallest,
}

pub(super) struct Fill<'a> {
    problem: &'a Problem<'a>,
    room: Room,
    style: Style,
    standing: Standing<'a>,
    /// Whether one that is more urgent than those whose turn it is was left out.
    is_left_out: bool,
    /// The steps that may still be spent on moving.
    steps: u64,
}

/// What machines are worth in comparison with each other.
#[derive(Clone, Copy)]
pub(super) struct Standing<'a> {
    /// How urgent each is; 0 is the most urgent.
    pub urgency: &'a [u32],
    /// Each one's turn among those of one urgency, the largest first.
    pub turn: &'a [u32],
    /// Whether no host has room for it even before anything is placed, or for what it waits for.
    pub hopeless: &'a [bool],
}

/// Which machines have their turn now.
struct Turns {
    until: u32,
    first: First,
    heap: BinaryHeap<std::cmp::Reverse<(u32, u32, u32)>>,
}

impl Turns {
    fn push(&mut self, standing: Standing<'_>, item: u32) {
        let (urgency, turn) = (standing.urgency[item as usize], standing.turn[item as usize]);
        if urgency <= self.until {
            let turn = if self.first == First::Largest { turn } else { u32::MAX - turn };
            self.heap.push(std::cmp::Reverse((urgency, turn, item)));
        }
    }
}

impl<'a> Fill<'a> {
    pub(super) fn new(problem: &'a Problem<'a>, style: Style, standing: Standing<'a>, steps: u64) -> Self {
        Self { problem, room: problem.room.clone(), style, standing, is_left_out: false, steps }
    }

    /// Places all that it can.
    pub(super) fn run(mut self) -> Room {
        let hopeful = |item: &u32| !self.standing.hopeless[*item as usize];
        let mut by_urgency: Vec<u32> = (0..self.problem.items.len() as u32).filter(hopeful).collect();
        by_urgency.sort_by_key(|item| (self.standing.urgency[*item as usize], self.standing.turn[*item as usize]));
        for machines in by_urgency
            .chunk_by(|one, next| self.standing.urgency[*one as usize] == self.standing.urgency[*next as usize])
        {
            self.place_all_of(machines);
        }
        settle(self.problem, &mut self.room, self.style, &by_urgency);
        self.room
    }

    fn place_all_of(&mut self, machines: &[u32]) {
        let until = self.standing.urgency[machines[0] as usize];
        let begun = self.room.changes();
        let mut left_out = self.place(machines, until, First::Largest);
        if left_out.is_empty() {
            return;
        }
        left_out = self.make_room(&left_out, until);
        if !left_out.is_empty() && machines.len() > 1 {
            let (count, changed) = (self.placed_since(begun), self.room.changed_since(begun));
            self.room.undo_to(self.problem, begun);
            let left_out_otherwise = self.place(machines, until, First::Smallest);
            let left_out_otherwise = self.make_room(&left_out_otherwise, until);
            if self.placed_since(begun) > count {
                left_out = left_out_otherwise;
            } else {
                self.room.undo_to(self.problem, begun);
                self.room.repeat(self.problem, &changed);
            }
        }
        self.is_left_out |= !left_out.is_empty();
    }

    /// How many machines of each rank were placed since then.
    fn placed_since(&self, changes: usize) -> Vec<u32> {
        let mut counts = vec![0; self.problem.ranks as usize];
        for (item, host) in self.room.changed_since(changes) {
            // What was placed before and only moved is in all the counts that this one is compared with.
            counts[self.problem.items[item as usize].rank as usize] += u32::from(host.is_some());
        }
        counts
    }

    /// Places machines of one urgency, and those that were only waiting for one of them. Returns those without a host.
    fn place(&mut self, machines: &[u32], until: u32, first: First) -> Vec<u32> {
        let mut turns = Turns { until, first, heap: BinaryHeap::new() };
        for &item in machines {
            if is_ready(self.problem, &self.room, item) {
                turns.push(self.standing, item);
            }
        }
        let mut left_out = Vec::new();
        while let Some(std::cmp::Reverse((_, _, item))) = turns.heap.pop() {
            match self.room.choose(self.problem, item, self.style) {
                Some(host) => {
                    self.room.put(self.problem, item, host);
                    self.release(item, &mut turns);
                }
                None => left_out.push(item),
            }
        }
        left_out
    }

    /// Gives their turn to those that were waiting for a machine that is placed now.
    fn release(&self, item: u32, turns: &mut Turns) {
        for &dependent in &self.problem.order.dependents[item as usize] {
            if is_ready(self.problem, &self.room, dependent) {
                turns.push(self.standing, dependent);
            }
        }
    }

    /// Moves one machine for each of those that were left out, where that makes room. Returns those that are left out still.
    ///
    /// While a more urgent machine is left out, only machines of this urgency are moved: what was found to have no room
    /// beside the more urgent ones then still has none.
    fn make_room(&mut self, left_out: &[u32], until: u32) -> Vec<u32> {
        let only = self.is_left_out.then_some(until);
        let mut turns = Turns { until, first: First::Smallest, heap: BinaryHeap::new() };
        for &item in left_out {
            turns.push(self.standing, item);
        }
        let mut left_out = Vec::new();
        while let Some(std::cmp::Reverse((_, _, item))) = turns.heap.pop() {
            let chosen = self.room.choose(self.problem, item, self.style);
            if let Some(host) = chosen {
                self.room.put(self.problem, item, host);
            }
            if chosen.is_some() || self.move_one_for(item, only) {
                self.release(item, &mut turns);
            } else {
                left_out.push(item);
            }
        }
        left_out
    }

    fn move_one_for(&mut self, item: u32, only: Option<u32>) -> bool {
        let problem = self.problem;
        for &host in &problem.kind(item).hosts {
            for at in 0..self.room.movable(host).len() {
                let other = self.room.movable(host)[at];
                self.steps = self.steps.saturating_sub(1);
                if self.steps == 0 {
                    return false;
                }
                if only.is_some_and(|only| self.standing.urgency[other as usize] != only)
                    || !self.room.would_fit_without(problem, item, host, other)
                {
                    continue;
                }
                self.steps = self.steps.saturating_sub(problem.kind(other).hosts.len() as u64);
                let begun = self.room.changes();
                self.room.remove(problem, other);
                self.room.put(problem, item, host);
                match self.room.choose(problem, other, self.style) {
                    Some(elsewhere) => {
                        self.room.put(problem, other, elsewhere);
                        return true;
                    }
                    None => self.room.undo_to(problem, begun),
                }
            }
        }
        false
    }
}

/// Whether a machine may be placed now: it is not yet, and all that it waits for is.
fn is_ready(problem: &Problem<'_>, room: &Room, item: u32) -> bool {
    let at = item as usize;
    room.place(item).is_none()
        && problem.items[at].barred.is_none()
        && problem.order.dependencies[at].iter().all(|one| room.place(*one).is_some())
}

/// Places machines that are left out where less urgent ones are, which are put out with those that wait for them. Each time
/// more of the more urgent have a place, so that it comes to an end.
pub(super) fn push_out(problem: &Problem<'_>, room: &mut Room, standing: Standing<'_>) {
    let mut by_urgency: Vec<u32> =
        (0..problem.items.len() as u32).filter(|item| !standing.hopeless[*item as usize]).collect();
    by_urgency.sort_by_key(|item| (problem.items[*item as usize].rank, standing.turn[*item as usize]));
    while by_urgency.iter().any(|item| push_out_for(problem, room, standing, *item)) {
        settle(problem, room, Style::Pack, &by_urgency);
    }
}

fn push_out_for(problem: &Problem<'_>, room: &mut Room, standing: Standing<'_>, item: u32) -> bool {
    if !is_ready(problem, room, item) {
        return false;
    }
    let rank = problem.items[item as usize].rank;
    for &host in &problem.kind(item).hosts {
        let begun = room.changes();
        let mut lesser: Vec<u32> = room.movable(host).to_vec();
        lesser.retain(|other| standing.urgency[*other as usize] > rank);
        // The least urgent go first.
        lesser.sort_by_key(|other| (std::cmp::Reverse(standing.urgency[*other as usize]), *other));
        for other in lesser {
            put_out(problem, room, other);
            if room.fits(&problem.items[item as usize], host) {
                room.put(problem, item, host);
                return true;
            }
        }
        room.undo_to(problem, begun);
    }
    false
}

fn put_out(problem: &Problem<'_>, room: &mut Room, item: u32) {
    if room.place(item).is_some() && problem.items[item as usize].kept_on.is_none() {
        room.remove(problem, item);
        problem.order.dependents[item as usize].iter().for_each(|one| put_out(problem, room, *one));
    }
}

/// Places whatever still has room somewhere, until nothing has.
fn settle(problem: &Problem<'_>, room: &mut Room, style: Style, by_urgency: &[u32]) {
    loop {
        let begun = room.changes();
        for &item in by_urgency {
            if is_ready(problem, room, item)
                && let Some(host) = room.choose(problem, item, style)
            {
                room.put(problem, item, host);
            }
        }
        if room.changes() == begun {
            return;
        }
    }
}
