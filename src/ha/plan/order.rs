//! What the dependencies among machines mean: who can be started at all, in which wave, and how urgent it is because of those
//! that wait for it.

use std::collections::VecDeque;

/// Names that are told of a circle; a long one is recognised by its beginning.
const NAMES_MAX: usize = 8;

/// Machines by number, each with those it must start after.
pub(super) struct Order {
    pub dependencies: Vec<Vec<u32>>,
    pub dependents: Vec<Vec<u32>>,
    /// The longest chain of dependencies below each.
    pub wave: Vec<u32>,
    /// Those on a circle, or waiting for one: what they wait for.
    pub tangled: Vec<Option<Tangle>>,
    /// Each after its dependencies; without the tangled ones.
    sorted: Vec<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Tangle {
    /// It is on this circle; only the first machines of a long one are named.
    Circle(Vec<u32>),
    /// It is on none, but waits for this one, which is tangled.
    Behind(u32),
}

impl Order {
    pub(super) fn new(dependencies: Vec<Vec<u32>>) -> Self {
        let count = dependencies.len();
        let mut dependents = vec![Vec::new(); count];
        for (machine, after) in (0_u32..).zip(&dependencies) {
            after.iter().for_each(|one| dependents[*one as usize].push(machine));
        }
        let mut wave = vec![0; count];
        let mut open: Vec<usize> = dependencies.iter().map(Vec::len).collect();
        let mut sorted: Vec<u32> = (0_u32..).zip(&open).filter(|(_, open)| **open == 0).map(|(one, _)| one).collect();
        let mut next = 0;
        while let Some(&machine) = sorted.get(next) {
            next += 1;
            for &dependent in &dependents[machine as usize] {
                let dependent_at = dependent as usize;
                wave[dependent_at] = wave[dependent_at].max(wave[machine as usize] + 1);
                open[dependent_at] -= 1;
                if open[dependent_at] == 0 {
                    sorted.push(dependent);
                }
            }
        }
        let tangled = tangles(&dependencies, &open);
        Self { dependencies, dependents, wave, tangled, sorted }
    }

    /// The rank (0 is the most urgent) of each, raised to that of the most urgent machine that waits for it, where `raises`
    /// says that this one counts.
    pub(super) fn raised(&self, ranks: &[u32], raises: &[bool]) -> Vec<u32> {
        let mut raised = ranks.to_vec();
        for &machine in self.sorted.iter().rev() {
            let machine = machine as usize;
            let urgent = self.dependents[machine].iter().map(|one| *one as usize).filter(|one| raises[*one]);
            raised[machine] = urgent.map(|one| raised[one]).chain([raised[machine]]).min().unwrap_or_default();
        }
        raised
    }

    /// Marks all that wait for a marked one, too, but for those that are `settled`: nobody waits in vain for them.
    pub(super) fn mark_dependents(&self, marked: &mut [bool], settled: &dyn Fn(u32) -> bool) {
        for &machine in self.sorted.iter().filter(|machine| !settled(**machine)) {
            let machine = machine as usize;
            marked[machine] |= self.dependencies[machine].iter().any(|one| marked[*one as usize]);
        }
    }
}

/// For each machine that waits for ever, a circle through it, or what it waits for.
fn tangles(dependencies: &[Vec<u32>], open: &[usize]) -> Vec<Option<Tangle>> {
    let mut tangled: Vec<Option<Tangle>> = vec![None; dependencies.len()];
    for start in 0..dependencies.len() {
        if open[start] == 0 || tangled[start].is_some() {
            continue;
        }
        let is_open = |one: &&u32| open[**one as usize] > 0;
        match circle(dependencies, open, start) {
            Some(circle) => {
                for at in 0..circle.len() {
                    let names = circle.iter().cycle().skip(at).take(circle.len().min(NAMES_MAX)).copied().collect();
                    tangled[circle[at] as usize] = Some(Tangle::Circle(names));
                }
            }
            None => tangled[start] = dependencies[start].iter().find(is_open).map(|one| Tangle::Behind(*one)),
        }
    }
    tangled
}

/// The shortest circle through a machine: each waits for the next, and the last for the first.
fn circle(dependencies: &[Vec<u32>], open: &[usize], start: usize) -> Option<Vec<u32>> {
    let mut reached_from: Vec<Option<usize>> = vec![None; dependencies.len()];
    let mut queue = VecDeque::from([start]);
    while let Some(machine) = queue.pop_front() {
        for &next in &dependencies[machine] {
            let next = next as usize;
            if next == start {
                let mut back = vec![machine as u32];
                let mut at = machine;
                while let Some(from) = reached_from[at] {
                    back.push(from as u32);
                    at = from;
                }
                back.reverse();
                return Some(back);
            }
            if open[next] > 0 && reached_from[next].is_none() {
                reached_from[next] = Some(machine);
                queue.push_back(next);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waves_are_the_longest_chains() {
        let order = Order::new(vec![vec![], vec![0], vec![0, 1], vec![]]);
        assert_eq!(order.wave, [0, 1, 2, 0]);
        assert!(order.tangled.iter().all(Option::is_none));
        let mut marked = vec![false, true, false, false];
        order.mark_dependents(&mut marked, &|_| false);
        assert_eq!(marked, [false, true, true, false]);
    }

    #[test]
    fn circles_are_named_and_so_is_who_waits_behind_one() {
        // 0 <-> 1, 2 after 1, 3 after itself, 4 is free, 5 after 4 and 2.
        let order = Order::new(vec![vec![1], vec![0], vec![1], vec![3], vec![], vec![4, 2]]);
        let expected = [
            Some(Tangle::Circle(vec![0, 1])),
            Some(Tangle::Circle(vec![1, 0])),
            Some(Tangle::Behind(1)),
            Some(Tangle::Circle(vec![3])),
            None,
            Some(Tangle::Behind(2)),
        ];
        assert_eq!(order.tangled, expected);
        let ring: Vec<Vec<u32>> = (0..10_000).map(|one| vec![(one + 1) % 10_000]).collect();
        let order = Order::new(ring);
        assert!(order.tangled.iter().all(|one| matches!(one, Some(Tangle::Circle(names)) if names.len() == NAMES_MAX)));
    }

    #[test]
    fn who_is_waited_for_is_as_urgent_as_who_waits() {
        let order = Order::new(vec![vec![], vec![0], vec![1], vec![]]);
        assert_eq!(order.raised(&[2, 1, 0, 0], &[true; 4]), [0, 0, 0, 0]);
        assert_eq!(order.raised(&[2, 1, 0, 0], &[true, true, false, true]), [1, 1, 0, 0]);
    }
}
