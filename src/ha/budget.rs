//! What a host's machines may take together, of their time or of the store's bytes, shared out where it protects most.
//!
//! Checkpointing a machine every `t` seconds, each of which costs `c`, takes `c / t` of what there is, and puts `t` of its work
//! at risk. The weighted sum of what is at risk is the least, for a given total, where each machine's share is proportional to
//! the square root of its weight times its cost. No machine gets more than it has a use for; what is left goes to the others.

use std::time::Duration;

/// What a machine would take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Demand {
    /// What a checkpoint costs: seconds of its time, or bytes.
    pub cost: f64,
    /// The interval that it is asked to have.
    pub wanted: Duration,
    /// What it may take in a second at most.
    pub most: f64,
    /// How much more its work is worth than that of a machine with 1.
    pub weight: f64,
}

impl Demand {
    /// The share that it has a use for.
    fn useful(&self) -> f64 {
        (self.cost / self.wanted.as_secs_f64().max(1e-6)).min(self.most)
    }
}

/// Each machine's share of `total`. Where there is enough for all, nobody is limited by it.
pub fn share(total: f64, demands: &[Demand]) -> Vec<f64> {
    let useful: Vec<f64> = demands.iter().map(Demand::useful).collect();
    if useful.iter().sum::<f64>() <= total {
        return vec![f64::INFINITY; demands.len()];
    }
    let claim = |demand: &Demand| (demand.weight.max(1e-6) * demand.cost).sqrt().max(1e-9);
    let mut shares = vec![0.0; demands.len()];
    let mut open: Vec<usize> = (0..demands.len()).collect();
    let mut left = total;
    while !open.is_empty() {
        let claims: f64 = open.iter().map(|at| claim(&demands[*at])).sum();
        let offer = |at: usize| left * claim(&demands[at]) / claims;
        let (sated, rest): (Vec<usize>, Vec<usize>) = open.iter().partition(|at| offer(**at) >= useful[**at]);
        if sated.is_empty() {
            open.iter().for_each(|at| shares[*at] = offer(*at));
            break;
        }
        for at in sated {
            shares[at] = useful[at];
            left = (left - useful[at]).max(0.0);
        }
        open = rest;
    }
    shares
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn demand(cost_ms: f64, wanted_ms: f64, weight: f64) -> Demand {
        Demand { cost: cost_ms / 1000.0, wanted: Duration::from_secs_f64(wanted_ms / 1000.0), most: 0.5, weight }
    }

    /// The weighted work at risk under shares.
    fn risk(demands: &[Demand], shares: &[f64]) -> f64 {
        demands.iter().zip(shares).map(|(demand, share)| demand.weight * demand.cost / share.max(1e-9)).sum()
    }

    #[test]
    fn who_weighs_more_or_costs_more_gets_more() {
        let shares = share(0.06, &[demand(10.0, 100.0, 1.0), demand(10.0, 100.0, 4.0)]);
        assert!((shares[0] - 0.02).abs() < 1e-9 && (shares[1] - 0.04).abs() < 1e-9, "{shares:?}");
        let shares = share(0.06, &[demand(10.0, 100.0, 1.0), demand(40.0, 100.0, 1.0)]);
        assert!((shares[0] - 0.02).abs() < 1e-9 && (shares[1] - 0.04).abs() < 1e-9, "{shares:?}");
        assert_eq!(share(1.0, &[demand(10.0, 100.0, 1.0)]), [f64::INFINITY]);
        assert!(share(1.0, &[]).is_empty());
    }

    proptest! {
        #[test]
        fn the_total_holds_and_no_other_division_protects_more(
            machines in proptest::collection::vec((0.1..100.0_f64, 50.0..5000.0_f64, 0.1..10.0_f64), 2..8),
            total in 0.001..0.3_f64, from in 0_usize..8, to in 0_usize..8, part in 0.01..0.5_f64,
        ) {
            let demands: Vec<Demand> = machines.iter().map(|(cost, wanted, weight)| demand(*cost, *wanted, *weight)).collect();
            let useful: Vec<f64> = demands.iter().map(Demand::useful).collect();
            let shares = share(total, &demands);
            if useful.iter().sum::<f64>() <= total {
                prop_assert!(shares.iter().all(|share| share.is_infinite()));
                return Ok(());
            }
            prop_assert!((shares.iter().sum::<f64>() - total).abs() < 1e-6);
            prop_assert!(shares.iter().zip(&useful).all(|(share, useful)| *share <= useful + 1e-9));
            let (from, to) = (from % demands.len(), to % demands.len());
            let mut other = shares.clone();
            let moved: f64 = (shares[from] * part).min(useful[to] - shares[to]).max(0.0);
            other[from] -= moved;
            other[to] += moved;
            prop_assert!(risk(&demands, &other) >= risk(&demands, &shares) * (1.0 - 1e-6));
        }
    }
}
