//! How the policy of protection behaves in six scenarios of simulated time.
//!
//! `cargo run --release --example policy_scenarios`

#![allow(clippy::disallowed_macros, reason = "an example prints plainly")]

#[path = "../ha/scenarios.rs"]
#[allow(dead_code, reason = "tests look at more of it")]
mod scenarios;

fn main() {
    let outcomes: Vec<_> = scenarios::scenarios().iter().map(scenarios::simulate).collect();
    print!("{}", scenarios::table(&outcomes));
}
