//! The best plan of all, where machines are few: every choice is tried that might be better than the best one found.

use super::fill::Standing;
use super::problem::Problem;
use super::room::Room;

/// With more machines than this there are too many choices.
const ITEMS_MAX: usize = 12;

/// What a plan is worth; the greater the better, from the first field to the last.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Value {
    /// How many machines of each priority are placed, from the highest to the lowest.
    placed: Vec<u32>,
    /// How many of them are where they had better be.
    preferred: u32,
    /// How much of their images is in their hosts' caches, in units.
    warm: u64,
}

impl Value {
    pub(super) fn of(problem: &Problem<'_>, room: &Room) -> Self {
        let mut value = Self { placed: vec![0; problem.ranks as usize], ..Self::default() };
        for item in 0..problem.items.len() as u32 {
            if let Some(host) = room.place(item) {
                value.add(problem, item, host);
            }
        }
        value
    }

    fn add(&mut self, problem: &Problem<'_>, item: u32, host: u32) {
        self.placed[problem.items[item as usize].rank as usize] += 1;
        self.preferred += u32::from(problem.kind(item).preferred[host as usize]);
        self.warm += problem.warm_units(item, host);
    }

    /// With the most that the machines may bring that are not decided on.
    fn with(&self, most: &Self) -> Self {
        Self {
            placed: self.placed.iter().zip(&most.placed).map(|(one, most)| one + most).collect(),
            preferred: self.preferred + most.preferred,
            warm: self.warm + most.warm,
        }
    }
}

struct Search<'a> {
    problem: &'a Problem<'a>,
    items: Vec<u32>,
    /// The most that the items from each on may bring.
    most: Vec<Value>,
    room: Room,
    best: Value,
    best_room: Option<Room>,
    steps: u64,
}

/// Looks for a better plan than the one that `room` holds, and tells whether there is none that is better still.
pub(super) fn improve(problem: &Problem<'_>, room: &Room, standing: Standing<'_>, steps: u64) -> (Option<Room>, bool) {
    let is_open = |item: &u32| {
        let one = &problem.items[*item as usize];
        one.barred.is_none() && one.kept_on.is_none() && !standing.hopeless[*item as usize]
    };
    let mut items: Vec<u32> = (0..problem.items.len() as u32).filter(is_open).collect();
    if items.len() > ITEMS_MAX {
        return (None, false);
    }
    // The most urgent first, and each after those that it waits for, which are no less urgent.
    items.sort_by_key(|item| {
        let at = *item as usize;
        (standing.urgency[at], problem.order.wave[at], standing.turn[at])
    });
    let mut most = vec![Value { placed: vec![0; problem.ranks as usize], ..Value::default() }];
    for item in items.iter().rev() {
        let mut value = most[most.len() - 1].clone();
        let kind = problem.kind(*item);
        value.placed[problem.items[*item as usize].rank as usize] += 1;
        value.preferred += u32::from(kind.hosts.iter().any(|host| kind.preferred[*host as usize]));
        value.warm += problem.items[*item as usize].warm.iter().map(|(_, units)| *units).max().unwrap_or(0);
        most.push(value);
    }
    most.reverse();
    let best = Value::of(problem, room);
    let mut search = Search { problem, items, most, room: problem.room.clone(), best, best_room: None, steps };
    let value = Value::of(problem, &search.room);
    search.decide(0, &value);
    (search.best_room, search.steps > 0)
}

impl Search<'_> {
    fn decide(&mut self, depth: usize, value: &Value) {
        self.steps = self.steps.saturating_sub(1);
        if self.steps == 0 || value.with(&self.most[depth]) <= self.best {
            return;
        }
        let Some(&item) = self.items.get(depth) else {
            self.best = value.clone();
            self.best_room = Some(self.room.clone());
            return;
        };
        let problem = self.problem;
        let dependencies = &problem.order.dependencies[item as usize];
        if dependencies.iter().all(|one| self.room.place(*one).is_some()) {
            for &host in &problem.kind(item).hosts {
                if self.room.fits(&problem.items[item as usize], host) {
                    let mut with = value.clone();
                    with.add(problem, item, host);
                    let begun = self.room.changes();
                    self.room.put(problem, item, host);
                    self.decide(depth + 1, &with);
                    self.room.undo_to(problem, begun);
                }
            }
        }
        self.decide(depth + 1, value);
    }
}
