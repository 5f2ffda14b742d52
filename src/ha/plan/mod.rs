//! Who goes where after hosts were lost: a function of what is known then, without I/O, clocks, threads or chance.
//!
//! **What a plan is measured against.** Of two plans the better one places more machines of the highest priority; if they
//! place as many, more of the next, and so on; then the one with more machines where they had better be; then the one with
//! more of their images in their hosts' caches, in units of 64 MiB. With up to twelve machines the plan is the best one
//! there is, if the steps that the settings allow are enough to prove it. With more it is what `fill.rs` finds, for which this
//! holds: no limit is exceeded, no machine is left out that a host has room for when all is placed, and none that waits for
//! nobody is left out where there would be room for it without less urgent machines. `Plan::is_proven` says whether no more
//! could have been placed.
//!
//! **Dependencies.** A machine that another one waits for counts as being as urgent as that one, unless that one is left out
//! anyway. Who waits for a machine that has no host has none either.
//!
//! The same situation gives the same plan, in whatever order its machines and hosts are listed.

#[cfg(test)]
mod exhaustive;
mod fill;
#[cfg(test)]
mod oracle;
mod order;
mod outcome;
mod problem;
#[cfg(test)]
mod properties;
mod reasons;
mod room;
mod search;
mod situation;

use fill::{Fill, Standing};
use problem::Problem;
use room::{Room, Style};
use search::Value;

pub use outcome::{Placement, Plan, Refusals, Unplaced, Why};
pub use situation::{HostState, Location, Need, Running, Settings, Situation, location_of};

/// How often it is tried again with machines that were left out not urging those on that they wait for.
const ROUNDS_MAX: u32 = 3;

/// Places machines on hosts.
pub fn plan(needs: &[Need], hosts: &[HostState], settings: &Settings) -> Plan {
    replan(needs, hosts, settings, &[])
}

/// Places machines on hosts, when an earlier plan is being carried out and its hosts are not what they were. `needs` are
/// still all of them, `hosts` those that are left, `placed` what was placed and has neither failed nor been given up.
///
/// What was placed stays, however urgent it is, unless its host is gone, or accepts nothing any more and does not run it yet. What a machine
/// takes is subtracted from its host's room unless the host says that it runs it.
pub fn replan(needs: &[Need], hosts: &[HostState], settings: &Settings, placed: &[Placement]) -> Plan {
    let problem = Problem::new(needs, hosts, placed, settings);
    let (room, is_proven) = solve(&problem, settings);
    told(&problem, &room, is_proven)
}

impl Situation {
    pub fn plan(&self) -> Plan {
        replan(&self.needs, &self.hosts, &self.settings, &self.placed)
    }
}

/// The best room that is found, and whether there is none with more machines in it.
fn solve(problem: &Problem<'_>, settings: &Settings) -> (Room, bool) {
    let all = 0..problem.items.len() as u32;
    let barred = |item: u32| problem.items[item as usize].barred.is_some();
    let is_placed = |item: u32| problem.room.place(item).is_some();
    let mut hopeless: Vec<bool> = (all.clone())
        .map(|item| !is_placed(item) && (barred(item) || problem.room.choose(problem, item, Style::Spread).is_none()))
        .collect();
    problem.order.mark_dependents(&mut hopeless, &is_placed);

    let mut largest_first: Vec<u32> = all.clone().collect();
    largest_first.sort_by(|left, right| {
        let size = |item: &u32| problem.items[*item as usize].size;
        size(right).total_cmp(&size(left)).then(left.cmp(right))
    });
    let mut turn = vec![0; problem.items.len()];
    for (at, item) in (0_u32..).zip(&largest_first) {
        turn[*item as usize] = at;
    }

    let ranks: Vec<u32> = problem.items.iter().map(|item| item.rank).collect();
    let mut raises: Vec<bool> = hopeless.iter().map(|is_hopeless| !is_hopeless).collect();
    let first_urgency = problem.order.raised(&ranks, &raises);
    let is_left_out = |room: &Room, item: u32| room.place(item).is_none() && !hopeless[item as usize];
    let mut urgency = first_urgency.clone();
    let mut best: Option<(Value, Room)> = None;
    for _ in 0..ROUNDS_MAX {
        let standing = Standing { urgency: &urgency, turn: &turn, hopeless: &hopeless };
        let mut room = Fill::new(problem, Style::Spread, standing, settings.repair_steps).run();
        if all.clone().any(|item| is_left_out(&room, item)) {
            let packed = Fill::new(problem, Style::Pack, standing, settings.repair_steps).run();
            if Value::of(problem, &packed) > Value::of(problem, &room) {
                room = packed;
            }
        }
        for item in all.clone().filter(|item| is_left_out(&room, *item)) {
            raises[item as usize] = false;
        }
        let value = Value::of(problem, &room);
        if best.as_ref().is_none_or(|(best, _)| value > *best) {
            best = Some((value, room));
        }
        let next = problem.order.raised(&ranks, &raises);
        if next == urgency {
            break;
        }
        urgency = next;
    }
    let mut room = best.map_or_else(|| problem.room.clone(), |(_, room)| room);

    let standing = Standing { urgency: &first_urgency, turn: &turn, hopeless: &hopeless };
    let (better, is_best) = search::improve(problem, &room, standing, settings.search_steps);
    // Half of a search may have found more machines a place, and yet have left out the wrong ones.
    if let Some(better) = better.filter(|better| is_best || !all.clone().any(|item| is_left_out(better, item))) {
        room = better;
    }
    if !is_best && all.clone().any(|item| is_left_out(&room, item)) {
        fill::push_out(problem, &mut room, standing);
    }
    let is_proven = is_best || !all.clone().any(|item| is_left_out(&room, item));
    (room, is_proven)
}

/// The plan that a room holds.
fn told(problem: &Problem<'_>, room: &Room, is_proven: bool) -> Plan {
    let mut plan = Plan { is_proven, ..Plan::default() };
    for (number, item) in (0_u32..).zip(&problem.items) {
        let Some(host) = room.place(number) else {
            plan.unplaced.push(reasons::unplaced(problem, room, number));
            continue;
        };
        let (state, need) = (problem.hosts[host as usize], item.need);
        plan.placements.push(Placement {
            machine: need.machine.clone(),
            epoch: need.epoch,
            host: state.id.clone(),
            wave: problem.order.wave[number as usize],
            priority: need.priority,
            warm_bytes: state.warm.get(&need.machine).map_or(0, |bytes| (*bytes).min(need.image_bytes)),
            is_preferred: problem.kind(number).preferred[host as usize],
            is_kept: item.kept_on.is_some(),
        });
    }
    plan.unplaced.extend(problem.repeated.iter().map(|need| reasons::repeated(need)));
    plan.placements.sort_by(|left, right| {
        (left.wave, right.priority, &left.machine).cmp(&(right.wave, left.priority, &right.machine))
    });
    plan.unplaced.sort_by(|left, right| (right.priority, &left.machine).cmp(&(left.priority, &right.machine)));
    plan
}
