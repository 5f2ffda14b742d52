//! A bounded cache of two generations: cheap to use and to evict from.

use std::collections::HashMap;
use std::hash::Hash;

/// Keeps what was used lately, up to a weight. When the young generation is full it becomes the old one, and what was
/// not used in either since is gone.
pub struct TwoGenerations<K, V> {
    young: HashMap<K, (V, usize)>,
    old: HashMap<K, (V, usize)>,
    young_weight: usize,
    old_weight: usize,
    weight_max: usize,
}

impl<K: Eq + Hash + Clone, V: Clone> TwoGenerations<K, V> {
    pub fn new(weight_max: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), young_weight: 0, old_weight: 0, weight_max }
    }

    pub fn get(&mut self, key: &K) -> Option<V> {
        if let Some((value, _)) = self.young.get(key) {
            return Some(value.clone());
        }
        let (key, (value, weight)) = self.old.remove_entry(key)?;
        self.old_weight -= weight;
        self.insert(key, value.clone(), weight);
        Some(value)
    }

    pub fn insert(&mut self, key: K, value: V, weight: usize) {
        if self.young_weight + weight > self.weight_max / 2 {
            self.old = std::mem::take(&mut self.young);
            self.old_weight = std::mem::take(&mut self.young_weight);
        }
        if let Some((_, replaced)) = self.young.insert(key, (value, weight)) {
            self.young_weight -= replaced;
        }
        self.young_weight += weight;
    }

    pub fn remove(&mut self, key: &K) {
        self.young_weight -= self.young.remove(key).map_or(0, |(_, weight)| weight);
        self.old_weight -= self.old.remove(key).map_or(0, |(_, weight)| weight);
    }

    /// The weight of all there is.
    pub fn weight(&self) -> usize {
        self.young_weight + self.old_weight
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_stays_and_the_weight_is_bounded() {
        let mut cache = TwoGenerations::new(100);
        for round in 0..1000 {
            cache.insert(round, round, 10);
            assert_eq!(cache.get(&0), Some(0), "round {round}");
            assert!(cache.young.len() + cache.old.len() <= 11);
            assert_eq!(cache.weight(), (cache.young.len() + cache.old.len()) * 10);
        }
        assert_eq!(cache.get(&500), None);
    }
}
