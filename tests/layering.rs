//! The wall plan: which module of `src/` may use which, where `unsafe` may stand, how big things may get, and that no test
//! passes without having done its work.
//!
//! In one crate the compiler does not keep layers apart, so this does. It reads the source as text, with comments and
//! literals blanked out, and looks for paths that begin at the crate's root. All offences are listed at once, each as
//! file:line and the rule.

#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// The layers, in the order of ARCHITECTURE.md. A module uses those of its own line and of lines above it.
const LAYERS: &[&[&str]] = &[
    &["limits", "ident", "clock", "printable", "log_queue"],
    &["wire"],
    &["sys"],
    &["mem"],
    &["ring"],
    &["frame", "verdict", "stats"],
    &["offload"],
    &["port"],
    &["switch"],
    &["shard"],
    &["config"],
    &["host"],
    &["control"],
    &["observe"],
    &["daemon", "cli"],
    &["bin"],
];

/// Pairs that never use each other, whatever their order: forwarding knows no kind of port.
const STRANGERS: &[(&str, &str)] = &[("port", "switch")];

/// The unsafe floor.
const UNSAFE: &[&str] = &["sys", "mem", "ring"];

/// Names that say nothing about what a module provides.
const EMPTY_NAMES: &[&str] = &["util", "utils", "common", "helper", "helpers", "base", "misc"];

const FILE_LINES: usize = 600;
const FUNCTION_LINES: usize = 70;

#[test]
fn modules_use_only_the_layers_above_them() {
    check(|file| file.layer_offences());
}

#[test]
fn unsafe_stands_on_its_floor_only() {
    check(|file| file.unsafe_offences());
}

#[test]
fn files_and_functions_are_small_and_files_say_what_they_are() {
    check(|file| file.size_offences());
}

#[test]
fn names_say_what_a_module_provides() {
    check(|file| file.name_offences());
}

#[test]
fn tests_skip_nothing() {
    for folder in ["src", "tests", "qemu-tests", "benches"] {
        check_in(folder, |file| file.skip_offences());
    }
}

/// Runs a rule over every file of `src/` and fails with all that it found.
fn check(rule: impl Fn(&Source) -> Vec<Offence>) {
    check_in("src", rule);
}

/// The same over every file of a folder.
fn check_in(folder: &str, rule: impl Fn(&Source) -> Vec<Offence>) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    walk(&root.join(folder), &mut paths);
    assert!(paths.len() > 5, "{folder}/ was not found");
    let mut report = String::new();
    for path in paths {
        let name = path.strip_prefix(root).unwrap().to_str().unwrap();
        let source = Source::new(name, &fs::read_to_string(&path).unwrap());
        for (line, what) in rule(&source) {
            writeln!(report, "  {name}:{line}: {what}").unwrap();
        }
    }
    assert!(report.is_empty(), "against the wall plan (tests/layering.rs):\n{report}");
}

fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            walk(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// A line number and what is wrong there.
type Offence = (usize, String);

/// One file.
struct Source {
    /// Its module path, from the crate's root: none for `lib.rs`.
    modules: Vec<String>,
    text: String,
    /// The text with comments and literals blanked out; lines and columns are kept.
    code: Vec<char>,
}

impl Source {
    /// The file `name`, which begins with `src/`.
    fn new(name: &str, text: &str) -> Self {
        let modules = name.trim_start_matches("src/").trim_end_matches(".rs").split('/');
        let modules = modules.filter(|part| !matches!(*part, "mod" | "lib")).map(String::from).collect();
        Self { modules, text: text.into(), code: blanked(text) }
    }

    fn layer_offences(&self) -> Vec<Offence> {
        let Some(own) = self.modules.first() else { return Vec::new() };
        // A binary is another crate and calls the library by its name.
        let root = if own == "bin" { "linecard" } else { "crate" };
        let mut offences = Vec::new();
        for (at, target) in self.root_paths(root) {
            offences.extend(forbidden(own, &target).map(|why| (self.line(at), why)));
        }
        offences.extend(self.escapes().map(|at| (self.line(at), "write crate::, not super::, for the root".into())));
        offences
    }

    /// Every `root::name` and every first name in a `root::{…}`, with its place.
    fn root_paths(&self, root: &str) -> Vec<(usize, String)> {
        let mut found = Vec::new();
        for (at, word) in self.words().filter(|(_, word)| word == root) {
            let after = at + word.len();
            if !self.follows(after, "::") {
                continue;
            }
            if !self.follows(after + 2, "{") {
                found.extend(self.module_at(after + 2));
                continue;
            }
            let mut depth = 0;
            for place in after + 2..self.code.len() {
                match self.code[place] {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    _ => {}
                }
                if depth == 1 && matches!(self.code[place], '{' | ',') {
                    found.extend(self.module_at(place + 1));
                }
                if depth == 0 {
                    break;
                }
            }
        }
        found
    }

    /// The name that begins at or after `at`, unless it is a macro's, which lives at the root whatever its module is.
    fn module_at(&self, at: usize) -> Option<(usize, String)> {
        let start = (at..self.code.len()).find(|&place| !self.code[place].is_whitespace())?;
        let name: String = self.code[start..].iter().take_while(|c| is_word(**c)).collect();
        let end = start + name.len();
        (!name.is_empty() && !self.follows(end, "!")).then_some((start, name))
    }

    /// Places of `super::` chains that climb to the crate's root, where they would hide a use of another layer.
    fn escapes(&self) -> impl Iterator<Item = usize> + '_ {
        let mut chain = (0, 0);
        self.words().filter_map(move |(at, word)| {
            if word != "super" {
                return None;
            }
            chain = if chain.1 == at { (chain.0 + 1, at + 7) } else { (1, at + 7) };
            (chain.0 >= self.modules.len() + self.inline_depth(at)).then_some(at)
        })
    }

    /// How many `mod name { … }` of this file the place is in.
    fn inline_depth(&self, at: usize) -> usize {
        let opens = |place: usize| -> Option<(usize, usize)> {
            let (_, name) = self.module_at(place + 3)?;
            let open = (place + 3..self.code.len()).find(|&p| matches!(self.code[p], '{' | ';'))?;
            (self.code[open] == '{' && !name.is_empty()).then(|| (open, self.closing(open)))
        };
        let modules = self.words().filter(|(place, word)| word == "mod" && *place < at);
        modules.filter_map(|(place, _)| opens(place)).filter(|&(open, close)| open < at && at < close).count()
    }

    fn unsafe_offences(&self) -> Vec<Offence> {
        if self.modules.first().is_some_and(|own| UNSAFE.contains(&own.as_str())) {
            return Vec::new();
        }
        let words = self.words().filter(|(_, word)| matches!(word.as_str(), "unsafe" | "unsafe_code"));
        words.map(|(at, word)| (self.line(at), format!("`{word}` outside of src/{{{}}}", UNSAFE.join(",")))).collect()
    }

    fn size_offences(&self) -> Vec<Offence> {
        let mut offences = Vec::new();
        if !self.text.starts_with("//! ") {
            offences.push((1, "a file opens with `//!` and says what it is".into()));
        }
        let lines: Vec<&str> = self.text.lines().map(str::trim).collect();
        let is_tests = |pair: &[&str]| pair[0] == "#[cfg(test)]" && pair[1].contains("mod ");
        let product = lines.windows(2).position(is_tests).unwrap_or(lines.len());
        if product > FILE_LINES {
            offences.push((FILE_LINES, format!("{product} lines before the tests, of {FILE_LINES}: split it by noun")));
        }
        for (at, _) in self.words().filter(|(_, word)| word == "fn") {
            // `fn(…)` without a name is a type; a function without a body ends in a semicolon.
            let Some((named, name)) = self.module_at(at + 2) else { continue };
            let body = (named..self.code.len()).find(|&p| matches!(self.code[p], '{' | ';'));
            let Some(open) = body.filter(|&p| self.code[p] == '{') else { continue };
            let (first, last) = (self.line(at), self.line(self.closing(open)));
            if last - first >= FUNCTION_LINES {
                offences.push((first, format!("fn {name} has {} lines, of {FUNCTION_LINES}", last - first + 1)));
            }
        }
        offences
    }

    /// What a test does that lacks something and passes all the same: it returns early, or only tells of it.
    fn skip_offences(&self) -> Vec<Offence> {
        const WHY: &str = "a test that cannot do its work fails and says what it needs";
        let attributes = (0..self.code.len()).filter(|&at| self.follows(at, "#[test]"));
        let bodies = attributes.filter_map(|at| (at..self.code.len()).find(|&p| self.code[p] == '{'));
        let bodies: Vec<_> = bodies.map(|open| open..self.closing(open)).collect();
        let is_early = |at: usize, word: &str| match word {
            "return" => {
                let next = self.code[at + word.len()..].iter().find(|c| !c.is_whitespace());
                matches!(next, Some(';' | '}' | ','))
            }
            word => word == "eprintln",
        };
        let early = self.words().filter(|(at, word)| is_early(*at, word));
        let early = early.filter(|(at, _)| bodies.iter().any(|body| body.contains(at)));
        early.map(|(at, word)| (self.line(at), format!("`{word}` in a test: {WHY}"))).collect()
    }

    fn name_offences(&self) -> Vec<Offence> {
        let empty = self.modules.iter().filter(|name| EMPTY_NAMES.contains(&name.as_str()));
        empty.map(|name| (1, format!("`{name}` says nothing about what the module provides"))).collect()
    }

    /// Words of the code, with their places.
    fn words(&self) -> impl Iterator<Item = (usize, String)> + '_ {
        let begins = |at: &usize| is_word(self.code[*at]) && (*at == 0 || !is_word(self.code[*at - 1]));
        (0..self.code.len())
            .filter(begins)
            .map(|at| (at, self.code[at..].iter().take_while(|c| is_word(**c)).collect()))
    }

    fn follows(&self, at: usize, what: &str) -> bool {
        what.chars().enumerate().all(|(n, c)| self.code.get(at + n) == Some(&c))
    }

    /// The brace that closes the one at `open`, or the end of the file.
    fn closing(&self, open: usize) -> usize {
        let mut depth = 0;
        let closes = |&at: &usize| {
            depth += i32::from(self.code[at] == '{') - i32::from(self.code[at] == '}');
            depth == 0
        };
        (open..self.code.len()).find(closes).unwrap_or(self.code.len())
    }

    fn line(&self, at: usize) -> usize {
        1 + self.code.iter().take(at).filter(|c| **c == '\n').count()
    }
}

/// Why module `own` may not use module `target`, if so.
fn forbidden(own: &str, target: &str) -> Option<String> {
    let rank = |module: &str| LAYERS.iter().position(|layer| layer.contains(&module));
    let (Some(from), Some(to)) = (rank(own), rank(target)) else {
        let unknown = if rank(own).is_none() { own } else { target };
        return Some(format!("`{unknown}` has no layer: give it one in LAYERS, or use a path through its module"));
    };
    let strangers = STRANGERS.iter().any(|&pair| pair == (own, target) || pair == (target, own));
    if strangers {
        Some(format!("`{own}` and `{target}` never use each other"))
    } else if to > from {
        Some(format!("`{own}` uses `{target}`, which stands below it"))
    } else {
        None
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The text with everything in comments, strings and character literals turned into spaces.
fn blanked(text: &str) -> Vec<char> {
    let mut code: Vec<char> = text.chars().collect();
    let mut at = 0;
    while at < code.len() {
        let end = match code[at] {
            '/' if code.get(at + 1) == Some(&'/') => find(&code, at, &['\n']),
            '/' if code.get(at + 1) == Some(&'*') => comment_end(&code, at),
            '"' => string_end(&code, at),
            'r' if (at == 0 || !is_word(code[at - 1]) || code[at - 1] == 'b') && raw_hashes(&code, at).is_some() => {
                let close: Vec<char> =
                    std::iter::once('"').chain(std::iter::repeat_n('#', raw_hashes(&code, at).unwrap())).collect();
                let open = at + close.len();
                find(&code, open + 1, &close) + close.len()
            }
            // A quote that closes two places on, or after an escape, is a character; any other is a lifetime.
            '\'' if code.get(at + 1) == Some(&'\\') => find(&code, at + 3, &['\'']) + 1,
            '\'' if code.get(at + 2) == Some(&'\'') => at + 3,
            _ => {
                at += 1;
                continue;
            }
        };
        let end = end.min(code.len());
        code[at..end].iter_mut().filter(|c| **c != '\n').for_each(|c| *c = ' ');
        at = end;
    }
    code
}

/// The first place from `at` on where `what` stands, or the end.
fn find(code: &[char], at: usize, what: &[char]) -> usize {
    (at..code.len()).find(|&place| code[place..].starts_with(what)).unwrap_or(code.len())
}

fn comment_end(code: &[char], start: usize) -> usize {
    let (mut at, mut depth) = (start, 0);
    while at < code.len() {
        match (code[at], code.get(at + 1)) {
            ('/', Some('*')) => (depth, at) = (depth + 1, at + 2),
            ('*', Some('/')) => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn string_end(code: &[char], start: usize) -> usize {
    let mut at = start + 1;
    while at < code.len() && code[at] != '"' {
        at += if code[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

/// How many `#` a raw string that begins with the `r` at `at` has; none if it is no raw string.
fn raw_hashes(code: &[char], at: usize) -> Option<usize> {
    let hashes = code[at + 1..].iter().take_while(|c| **c == '#').count();
    (code.get(at + 1 + hashes) == Some(&'"')).then_some(hashes)
}

fn offences(name: &str, text: &str, rule: impl Fn(&Source) -> Vec<Offence>) -> Vec<usize> {
    rule(&Source::new(name, text)).into_iter().map(|(line, _)| line).collect()
}

#[test]
fn uses_of_lower_layers_are_seen_in_every_form() {
    let layers = |name, text| offences(name, text, Source::layer_offences);
    let text = "//! See [`crate::daemon`].\nuse crate::port::{self, Batch};\nuse crate::{frame, switch::{a, shard}, cli};\n\
                fn f() { crate::observe::x(\"crate::cli\", '\"', crate::mac!()) } // crate::cli\n/* crate::cli */\n\
                use crate::nonesuch;\nlet r = r#\"\"crate::cli\"#; crate::host::x();";
    assert_eq!(layers("src/shard/turn.rs", text), [3, 4, 6, 7]);
    assert_eq!(layers("src/switch/mod.rs", "use crate::port::Port;\nuse crate::verdict::Verdict;"), [1]);
    assert_eq!(layers("src/port/vnic/ring.rs", "use crate::switch::Fdb;\nuse crate::ring::Split;"), [1]);
    assert_eq!(layers("src/mem/mod.rs", "use crate::sys::cpu;\nuse crate::ring::Split;"), [2]);
    assert_eq!(layers("src/bin/linecard.rs", "use linecard::cli;\nuse linecard::cellar;"), [2]);
    assert_eq!(layers("src/attic.rs", "use crate::ident;"), [1]);
}

#[test]
fn climbing_to_the_root_is_seen() {
    let layers = |name, text| offences(name, text, Source::layer_offences);
    assert_eq!(layers("src/wire/mod.rs", "use super::switch;\nmod tests { use super::*; }"), [1]);
    assert_eq!(
        layers("src/wire/arp.rs", "use super::ethernet;\nuse super::super::ring;\nmod t { use super::super::x; }"),
        [2]
    );
}

#[test]
fn tests_that_skip_are_seen() {
    let skips = |text| offences("tests/idle.rs", text, Source::skip_offences);
    let text = "#[test]\nfn a() {\n  if one() { return; }\n let Some(x) = y else { return };\n eprintln!(\"no\");\n}\n\
                fn b() { if one() { return; } println!(); }\n#[test]\nfn c() { let d = |e| { return e; }; }\n";
    assert_eq!(skips(text), [3, 4, 5]);
}

#[test]
fn unsafe_long_and_nameless_things_are_seen() {
    let text = "//! Not `unsafe`.\n#![allow(unsafe_code)]\nfn f() { unsafe { g() } } // unsafe\n";
    assert_eq!(offences("src/port/tap.rs", text, Source::unsafe_offences), [2, 3]);
    assert_eq!(offences("src/ring/split.rs", text, Source::unsafe_offences), []);
    let long = format!("//! x\nfn short(f: fn(u8)) {{{}}}\nfn long() {{{}}}\n", "\n".repeat(69), "\n".repeat(70));
    assert_eq!(offences("src/clock.rs", &long, Source::size_offences), [72]);
    let tests = format!("//! x\n{}#[cfg(test)]\nmod tests {{}}\n{}", "\n".repeat(599), "\n".repeat(99));
    assert_eq!(offences("src/clock.rs", &tests, Source::size_offences), []);
    assert_eq!(offences("src/clock.rs", &format!("\n{tests}"), Source::size_offences), [1, 600]);
    assert_eq!(offences("src/port/util/mod.rs", "", Source::name_offences), [1]);
}
