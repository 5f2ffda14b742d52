//! Encrypted repositories as their operators meet them: keys, commands, and what the repository's files show.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::support::{Mountpoint, Ran, World, can_mount_or_skip, collect, copy_directory, pages, run};

/// Runs with these keys and no others.
fn with(world: &World, keys: &[&Path], words: &[&str]) -> Ran {
    let mut command = world.command(words);
    command.env_remove("EPOCHFS_KEY").env_remove("EPOCHFS_ENCRYPT");
    keys.iter().for_each(|key| {
        command.arg("--key-file").arg(key);
    });
    run(command)
}

fn generate(world: &World, name: &str) -> PathBuf {
    let path = world.path(name);
    with(world, &[], &["key", "generate", path.to_str().unwrap()]).code(0);
    path
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap().trim().to_owned()
}

/// An encrypted repository and its key.
fn encrypted() -> (World, PathBuf) {
    let world = World::empty();
    let key = generate(&world, "key");
    with(&world, &[&key], &["init", "--encrypt"]).code(0);
    (world, key)
}

fn commit(world: &World, key: &Path, machine: &str, content: &[u8]) {
    let memory = format!("memory={}", world.file("memory", content).display());
    with(world, &[key], &["commit", machine, &memory]).code(0).quiet();
}

fn exported(world: &World, keys: &[&Path], epoch: &str) -> Vec<u8> {
    let target = tempfile::tempdir_in(world.path("")).unwrap();
    with(world, keys, &["export", epoch, "--output", target.path().to_str().unwrap()]).code(0).quiet();
    std::fs::read(target.path().join("memory")).unwrap()
}

fn ids(world: &World, key: &Path) -> Vec<String> {
    let listed = with(world, &[key], &["key", "list", "--json"]).code(0).json();
    listed["keys"].as_array().unwrap().iter().map(|key| key["id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_key_is_found_where_it_is_said_to_be_and_a_wrong_one_is_told() {
    let (world, key) = encrypted();
    assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    with(&world, &[], &["key", "generate", key.to_str().unwrap()]).code(4).says("exists");
    let content = pages(1, 50);
    commit(&world, &key, "web1", &content);
    assert_eq!(exported(&world, &[&key], "web1"), content);
    let by = |name: &str, value: &str| {
        let mut command = world.command(["ls"]);
        command.env_remove("EPOCHFS_KEY").env(name, value);
        run(command)
    };
    let other = generate(&world, "other");
    by("EPOCHFS_KEY_FILE", key.to_str().unwrap()).code(0);
    by("EPOCHFS_KEY_FILE", &format!("{}:{}", other.display(), key.display())).code(0);
    by("EPOCHFS_KEY", &text(&key)).code(0);
    by("EPOCHFS_KEY_COMMAND", &format!("cat '{}'", key.display())).code(0);
    with(&world, &[&other, &key], &["ls"]).code(0);
    let both = world.file("both", format!("# two\n{}\n\n{}\n", text(&other), text(&key)));
    std::fs::set_permissions(&both, std::fs::Permissions::from_mode(0o600)).unwrap();
    with(&world, &[&both], &["ls"]).code(0);

    with(&world, &[], &["ls"]).code(2).says("is encrypted, and no key is given").says("--key-file");
    with(&world, &[&other], &["ls"]).code(2).says("does not open it");
    with(&world, &[&world.path("none")], &["ls"]).code(5).says("none");
    by("EPOCHFS_KEY_COMMAND", "exit 7").code(2).says("EPOCHFS_KEY_COMMAND");
    by("EPOCHFS_KEY", "hunter2").code(2).says("EPOCHFS_KEY");
    assert!(!by("EPOCHFS_KEY", "hunter2").stderr.contains("hunter2"));
    for mode in [0o640, 0o604, 0o660] {
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(mode)).unwrap();
        with(&world, &[&key], &["ls"]).code(2).says("open to others").says("chmod 600");
    }
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    // Not a word of the key, however much is said.
    let mut command = world.command(["-vv", "--key-file", key.to_str().unwrap(), "doctor"]);
    command.env("EPOCHFS_LOG", "trace").env("EPOCHFS_KEY", text(&other));
    let said = run(command);
    for secret in [text(&key), text(&other)] {
        assert!(!said.stderr.contains(&secret[..16]) && !said.stdout.contains(&secret[..16]));
    }
}

#[test]
fn init_takes_a_key_before_it_makes_anything_and_says_what_it_made() {
    let world = World::empty();
    with(&world, &[], &["init", "--encrypt"]).code(2).says("no key is given").says("key generate");
    with(&world, &[&world.path("none")], &["init", "--encrypt"]).code(5);
    assert!(!world.repository().join("epochfs.json").exists());
    let key = generate(&world, "key");
    let made = with(&world, &[&key], &["init", "--encrypt", "--json"]).code(0).json();
    assert_eq!(made["encrypted"], true);
    with(&world, &[&key], &["init", "--encrypt"]).code(4).says("already holds a repository");
    // One that is not encrypted takes no notice of keys, but says so when it is made.
    let plain = world.path("plain");
    let words = ["--repo", plain.to_str().unwrap(), "init"];
    with(&world, &[&key], &words).code(0).says("not encrypted");
    let words = ["--repo", plain.to_str().unwrap(), "ls"];
    with(&world, &[&key], &words).code(0).quiet();
    with(&world, &[&key], &["--repo", plain.to_str().unwrap(), "key", "list"]).code(2).says("is not encrypted");
    // A host on which all are to be encrypted.
    let mut command = world.command(["--repo", world.path("third").to_str().unwrap(), "init", "--json"]);
    command.env("EPOCHFS_ENCRYPT", "1").env("EPOCHFS_KEY_FILE", &key);
    assert_eq!(run(command).code(0).json()["encrypted"], true);
    // Nobody has it take another for one of them, and write to it in the clear.
    let mut command = world.command(["--repo", plain.to_str().unwrap(), "ls"]);
    command.env("EPOCHFS_ENCRYPT", "1").env("EPOCHFS_KEY_FILE", &key);
    run(command).code(2).says("is not encrypted, and EPOCHFS_ENCRYPT says");
}

/// Whether any file below the directory has these bytes.
fn is_seen(directory: &Path, needle: &[u8]) -> bool {
    let mut files = std::collections::BTreeMap::new();
    collect(directory, Path::new(""), &mut files);
    assert!(files.len() > 2);
    files.values().any(|bytes| bytes.windows(needle.len()).any(|window| window == needle))
}

#[test]
fn nothing_of_what_is_stored_is_seen_in_the_repository() {
    let seen = |world: &World, keys: &[&Path]| {
        let mut content = pages(5, 40);
        let marker = b"-----BEGIN PRIVATE KEY-----";
        content[8192..8192 + marker.len()].copy_from_slice(marker);
        let memory = format!("a-stream-of-secrets={}", world.file("memory", &content).display());
        with(world, keys, &["commit", "web1", &memory, "-m", "a message for some", "--tag", "golden"]).code(0);
        let page = |number: usize| &content[number * 4096..(number + 1) * 4096];
        // An outsider who guesses a page can tell its hash.
        let hashes = [2, 7].map(|number| *blake3::hash(page(number)).as_bytes());
        let needles: [&[u8]; 7] =
            [marker, &page(7)[..64], &hashes[0], &hashes[1], b"a-stream-of-secrets", b"a message for some", b"golden"];
        needles.map(|needle| is_seen(&world.repository(), needle))
    };
    let (world, key) = encrypted();
    assert_eq!(seen(&world, &[&key]), [false; 7]);
    assert!(!is_seen(&world.repository(), b"EPOCHOBJ"));
    // The same is seen where nothing is encrypted.
    let plain = World::empty();
    with(&plain, &[], &["init"]).code(0);
    assert_eq!(seen(&plain, &[]), [true; 7]);
}

#[test]
fn a_repository_is_opened_by_the_keys_that_it_was_given_and_always_by_one() {
    let (world, first) = encrypted();
    let content = pages(1, 50);
    commit(&world, &first, "web1", &content);
    let [second, third] = ["second", "third"].map(|name| generate(&world, name));
    let first_id = ids(&world, &first).remove(0);
    let path = |key: &Path| key.to_str().unwrap().to_owned();
    with(&world, &[&first], &["key", "add", &path(&second)]).code(0);
    with(&world, &[&first], &["key", "add", &path(&second)]).code(0);
    assert_eq!((ids(&world, &second).len(), exported(&world, &[&second], "web1")), (2, content.clone()));
    // One that is given must stay.
    with(&world, &[&first], &["key", "remove", &first_id]).code(2).says("none that is given would open");
    with(&world, &[&second], &["key", "remove", &first_id]).code(0);
    with(&world, &[&second], &["key", "remove", &first_id]).code(0);
    with(&world, &[&first], &["ls"]).code(2).says("does not open it");
    let second_id = ids(&world, &second).remove(0);
    with(&world, &[&second], &["key", "remove", &second_id]).code(2);
    with(&world, &[&second, &first], &["key", "remove", &second_id]).code(2);
    with(&world, &[&second], &["key", "remove", &"0".repeat(32)]).code(5).says("key list");
    with(&world, &[&second], &["key", "remove", "web1"]).code(2);
    // What was removed stays so.
    with(&world, &[&second], &["key", "add", &path(&first)]).code(4).says("was removed");
    let rotated = with(&world, &[&second], &["key", "rotate", &path(&third), "--json"]).code(0).json();
    assert_eq!(
        (ids(&world, &third), &rotated["removed"][0]),
        (vec![rotated["added"].as_str().unwrap().to_owned()], &second_id.into())
    );
    with(&world, &[&third], &["key", "rotate", &path(&third)]).code(0);
    with(&world, &[&second], &["verify"]).code(2);
    assert_eq!(exported(&world, &[&third], "web1"), content);
    with(&world, &[&third], &["verify"]).code(0).quiet();
    // A damaged one is told as what it is.
    let wrapped = world.repository().join("keys").join(&ids(&world, &third)[0]);
    let sound = std::fs::read(&wrapped).unwrap();
    let mut flipped = sound.clone();
    flipped[80] ^= 1;
    std::fs::write(&wrapped, flipped).unwrap();
    with(&world, &[&third], &["ls"]).code(3).says("keys/");
    std::fs::write(&wrapped, sound).unwrap();
    with(&world, &[&third], &["ls"]).code(0);
}

#[test]
fn every_command_works_on_what_is_encrypted() {
    let (world, key) = encrypted();
    let ok = |words: &[&str]| with(&world, &[&key], words).code(0).quiet().stdout.clone();
    let mut content = pages(1, 3000);
    commit(&world, &key, "web1", &content);
    for epoch in 2..=20 {
        let at = epoch * 40 * 4096;
        content[at..at + 4096].copy_from_slice(&pages(epoch as u64, 1));
        world.file("dirty", format!("{at} 4096\n"));
        let (memory, dirty) = (world.file("memory", &content), world.path("dirty"));
        ok(&["commit", "web1", &format!("memory={}", memory.display()), "--dirty", dirty.to_str().unwrap()]);
    }
    assert!(exported(&world, &[&key], "web1") == content);
    ok(&["tag", "web1@20", "golden"]);
    ok(&["clone", "web1@golden", "web2"]);
    for words in ["ls", "log web1", "show web1", "diff web1@1 web1@20", "stats", "stats --freed", "hosts", "doctor"] {
        with(&world, &[&key], &words.split(' ').collect::<Vec<_>>()).code(0);
    }
    ok(&["gc", "compact", "web1"]);
    with(&world, &[&key], &["prune", "web1", "--keep-last", "2", "--yes"]).code(0);
    with(&world, &[&key], &["gc", "run"]).code(0);
    assert!(exported(&world, &[&key], "web1") == content && exported(&world, &[&key], "web2") == content);
    ok(&["verify"]);
}

#[test]
fn epochs_are_copied_between_repositories_with_other_keys_or_none() {
    let (world, key) = encrypted();
    let content = pages(1, 300);
    commit(&world, &key, "web1", &content);
    let other_key = generate(&world, "other");
    let (other, plain) = (world.path("other-repository"), world.path("plain-repository"));
    let (other, plain) = (other.to_str().unwrap(), plain.to_str().unwrap());
    with(&world, &[&other_key], &["--repo", other, "init", "--encrypt"]).code(0);
    with(&world, &[], &["--repo", plain, "init"]).code(0);
    with(&world, &[&key], &["copy", "web1", "--to", other]).code(2).says("does not open it");
    with(&world, &[&key, &other_key], &["copy", "web1", "--to", other]).code(0).quiet();
    with(&world, &[&other_key], &["--repo", other, "copy", "web1", "--to", plain]).code(0).quiet();
    with(
        &world,
        &[&key],
        &["--repo", plain, "copy", "web1", "--to", world.repository().to_str().unwrap(), "--as", "web2"],
    )
    .code(0)
    .quiet();
    assert_eq!(exported(&world, &[&key], "web2"), content);
    with(&world, &[&key], &["verify"]).code(0).quiet();
}

#[test]
fn damage_is_told_and_repaired_from_copies_with_the_same_key_another_or_none() {
    let (world, key) = encrypted();
    let content = pages(1, 300);
    commit(&world, &key, "web1", &content);
    let (copy, plain) = (world.path("copy"), world.path("plain"));
    copy_directory(&world.repository(), &copy);
    with(&world, &[], &["--repo", plain.to_str().unwrap(), "init"]).code(0);
    with(&world, &[&key], &["copy", "web1", "--to", plain.to_str().unwrap()]).code(0);
    let packs: Vec<_> = world.snapshot().into_iter().filter(|(name, _)| name.starts_with("packs")).collect();
    for from in [&copy, &plain] {
        for (name, sound) in &packs {
            let mut damaged = sound.clone();
            damaged[9000] ^= 1;
            // The footer, without which only another copy of the same object tells what was in the first segment.
            let last = damaged.len() - 1;
            damaged[last] ^= u8::from(from == &copy);
            std::fs::write(world.repository().join(name), damaged).unwrap();
        }
        with(&world, &[&key], &["verify"]).code(3);
        with(&world, &[&key], &["repair", "--from", from.to_str().unwrap(), "--yes"]).code(0);
        with(&world, &[&key], &["verify"]).code(0).quiet();
        assert_eq!(exported(&world, &[&key], "web1"), content);
    }
    // Another's object in the place of one, and one that was cut off.
    let (name, sound) = &packs[0];
    for bad in [packs[packs.len() - 1].1[..100].to_vec(), sound[..16384].to_vec(), Vec::new()] {
        std::fs::write(world.repository().join(name), bad).unwrap();
        with(&world, &[&key], &["verify"]).code(3);
    }
    with(&world, &[&key], &["repair", "--from", copy.to_str().unwrap(), "--yes"]).code(0);
    with(&world, &[&key], &["verify"]).code(0).quiet();
}

#[test]
fn a_mount_and_its_daemon_find_the_key_that_the_command_was_given() {
    if !can_mount_or_skip("a_mount_and_its_daemon_find_the_key_that_the_command_was_given") {
        return;
    }
    let (world, key) = encrypted();
    let content = pages(1, 300);
    commit(&world, &key, "web1", &content);
    let mountpoint = Mountpoint::new(&world, "mount");
    // A relative path, as the daemon has another working directory.
    let mut command = world.command(["--key-file", "key", "mount", "--background", mountpoint.text()]);
    command.current_dir(world.path("")).env_remove("EPOCHFS_KEY");
    run(command).code(0);
    let live = mountpoint.path.join("web2/live");
    std::fs::create_dir(mountpoint.path.join("web2")).unwrap();
    std::fs::write(live.join("memory"), &content).unwrap();
    with(&world, &[&key], &["commit", "web2"]).code(0).quiet();
    assert_eq!(std::fs::read(mountpoint.path.join("web1/epochs/1/memory")).unwrap(), content);
    assert_eq!(std::fs::read(mountpoint.path.join("web2/latest/memory")).unwrap(), content);
    std::fs::write(live.join("disk"), &content).unwrap();
    let status = with(&world, &[&key], &["status", "--json"]).code(0).json();
    let line = std::fs::read(format!("/proc/{}/cmdline", status["daemons"][0]["pid"])).unwrap();
    assert!(!String::from_utf8_lossy(&line).contains(&text(&key)[..16]));
    // What this host keeps is for its owner alone, whatever the mask and the directory above.
    let own = std::fs::read_dir(world.state()).unwrap().map(|entry| entry.unwrap().path());
    for directory in own.filter(|path| path.is_dir()) {
        let mode = std::fs::metadata(&directory).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{} is open to others", directory.display());
    }
    with(&world, &[&key], &["umount", mountpoint.text()]).code(0);
    with(&world, &[&key], &["verify"]).code(0).quiet();
    assert!(!is_seen(&world.repository(), &content[..64]));
    with(&world, &[], &["mount", "--background", mountpoint.text()]).code(2).says("is encrypted, and no key is given");
}
