//! `epochfs repair`, and verifications that go on, as processes.

use std::collections::BTreeMap;
use std::path::PathBuf;

use epochfs_format::{BlockKind, TRAILER_LEN, Trailer};
use serde_json::Value;

use crate::support::{World, collect, copy_directory, kill, pages, wait_until};

fn packs(world: &World) -> Vec<PathBuf> {
    let mut files = BTreeMap::new();
    collect(&world.repository().join("packs"), &world.repository().join("packs"), &mut files);
    files.into_keys().map(|path| world.repository().join("packs").join(path)).collect()
}

/// Damages the first so many pages of a pack.
fn damage(path: &PathBuf, pages: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    let trailer = Trailer::decode(&bytes, bytes.len() as u64).unwrap();
    let footer = trailer.decode_footer(&bytes[trailer.footer_offset as usize..bytes.len() - TRAILER_LEN]).unwrap();
    for entry in footer.iter().filter(|entry| entry.kind == BlockKind::Page).take(pages) {
        bytes[entry.offset as usize + 50..entry.offset as usize + 90].fill(0x77);
    }
    std::fs::write(path, bytes).unwrap();
}

fn world() -> (World, Vec<u8>) {
    let world = World::new();
    let content = pages(1, 300);
    world.commit("web1", &world.file("memory", &content));
    (world, content)
}

fn repair(world: &World, more: &[&str], code: i32) -> Value {
    let mut arguments = vec!["repair", "--json"];
    arguments.extend(more);
    let ran = world.run(arguments);
    ran.code(code);
    ran.json()
}

#[test]
fn damage_is_planned_and_then_repaired_from_a_copy() {
    let (world, content) = world();
    let copy = world.path("copy");
    copy_directory(&world.repository(), &copy);
    let copy = copy.display().to_string();
    assert_eq!(repair(&world, &[], 0)["whole"], true);
    let pack = packs(&world).remove(0);
    let sound = std::fs::read(&pack).unwrap();
    damage(&pack, 3);
    let verified = world.run(["verify", "--json"]);
    let verified = verified.code(3).json();
    assert_eq!(verified["broken_epochs"][0]["stream"], "memory");
    assert_eq!(verified["broken_epochs"][0]["ranges"][0], serde_json::json!({"first": 0, "pages": 3}));
    // A plan changes nothing.
    let damaged = std::fs::read(&pack).unwrap();
    let plan = repair(&world, &["--from", &copy], 3);
    assert_eq!((plan["is_applied"].as_bool(), plan["whole"].as_bool()), (Some(false), Some(false)));
    assert_eq!(plan["repaired_blocks"].as_array().unwrap().len(), 3);
    assert_eq!(std::fs::read(&pack).unwrap(), damaged);
    let words = world.run(["repair", "--from", &copy]);
    assert!(words.stdout.contains("would be repaired") && words.stdout.contains("--yes"), "{}", words.stdout);
    // Without a copy they are lost, and quarantined; with one they come back.
    let lost = repair(&world, &["--yes"], 3);
    assert_eq!((lost["lost"].as_array().unwrap().len(), &lost["quarantined_blocks"]), (3, &Value::from(3)));
    let repaired = repair(&world, &["--from", &copy, "--yes"], 0);
    assert_eq!(
        (repaired["repaired_blocks"].as_array().unwrap().len(), &repaired["quarantined_blocks"]),
        (3, &Value::from(0))
    );
    assert_eq!(std::fs::read(&pack).unwrap(), sound);
    assert_eq!(world.memory("web1"), content);
    world.verify();
    assert!(world.ok(["repair", "--yes"]).stdout.contains("nothing to repair"));
}

#[test]
fn what_is_lost_is_stored_again_by_the_next_commit_and_found_by_the_next_repair() {
    let (world, content) = world();
    let file = world.file("memory", &content);
    damage(&packs(&world)[0], 5);
    repair(&world, &["--yes"], 3);
    let committed = world.commit("web2", &file);
    assert_eq!(committed["new_pages"], 5);
    assert_eq!(world.memory("web2"), content);
    world.run(["export", "web1", "--output", world.path("out").to_str().unwrap()]).code(3);
    assert_eq!(repair(&world, &["--yes"], 0)["repaired_blocks"].as_array().unwrap().len(), 5);
    assert_eq!(world.memory("web1"), content);
    world.verify();
}

#[test]
fn a_repair_from_what_cannot_be_opened_says_so() {
    let (world, _) = world();
    world.run(["repair", "--from", world.path("missing").to_str().unwrap()]).code(5).says("missing");
    world.run(["repair", "--from", "s3x://bucket"]).code(2).says("s3x");
}

#[test]
fn a_verification_that_was_killed_goes_on_where_it_stopped() {
    let (world, _) = world();
    for machine in 2..8 {
        let file = world.file("memory", pages(machine, 300));
        world.commit(&format!("web{machine}"), &file);
    }
    let state = || {
        let mut files = BTreeMap::new();
        collect(&world.state(), &world.state(), &mut files);
        files.into_iter().find(|(path, _)| path.ends_with("verify.json"))
    };
    damage(&packs(&world)[0], 1);
    // Slow enough to be caught, and it notes how far it has come every few seconds.
    let mut child = world.start(["verify", "--rate", "400k"]);
    wait_until("the verification has noted how far it has come", || state().is_some());
    kill(child.id(), rustix::process::Signal::KILL);
    child.wait().unwrap();
    let (path, noted) = state().unwrap();
    let noted: Value = serde_json::from_slice(&noted).unwrap();
    let bytes = noted["bytes"].as_u64().unwrap();
    assert!(bytes > 0);
    // What is not such a note has it begin anew, with a word.
    let path = world.state().join(path);
    let sound = std::fs::read(&path).unwrap();
    for wrong in [&b"{"[..], b"", b"{\"version\": 1}", &[0xff; 100]] {
        std::fs::write(&path, wrong).unwrap();
        let ran = world.run(["verify", "--resume", "--json"]);
        ran.code(3).says("begins anew");
        assert_eq!(ran.json()["resumed_at_bytes"], 0);
    }
    let mut other: Value = serde_json::from_slice(&sound).unwrap();
    other["repository"] = "00000000000000000000000000000000".into();
    std::fs::write(&path, other.to_string()).unwrap();
    world.run(["verify", "--resume"]).code(3).says("begins anew");
    std::fs::write(&path, &sound).unwrap();
    let whole = world.run(["verify", "--json"]).code(3).json();
    assert!(!path.exists(), "without --resume it begins anew, and forgets the note");
    std::fs::write(&path, &sound).unwrap();
    let resumed = world.run(["verify", "--data", "--resume", "--json"]).code(3).json();
    assert_eq!(resumed["resumed_at_bytes"], bytes);
    for field in ["objects", "bytes", "pages", "epochs", "machines", "problems", "broken_epochs"] {
        assert_eq!(resumed[field], whole[field], "{field}");
    }
    assert!(!path.exists(), "it came to its end");
}
