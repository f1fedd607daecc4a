//! `tests/api-cases`: what the API must do in every language.

/// Compares what a language has with what the list says that it has.
pub fn compare(language: &str, have: &[&str]) {
    let listed = listed(language);
    let missing: Vec<_> = listed.iter().filter(|name| !have.contains(name)).collect();
    let unlisted: Vec<_> = have.iter().filter(|name| !listed.contains(name)).collect();
    assert!(
        missing.is_empty() && unlisted.is_empty(),
        "tests/api-cases: missing in {language}: {missing:?}; in {language}, but not listed for it: {unlisted:?}"
    );
}

/// The names of the cases that `language` has.
pub fn listed(language: &str) -> Vec<&'static str> {
    let lines = include_str!("../api-cases").lines().map(|line| line.split('#').next().unwrap_or_default());
    let cases = lines.filter_map(|line| {
        let mut words = line.split_whitespace();
        let name = words.next()?;
        let languages = words.next().unwrap_or("rust,c,python");
        languages.split(',').any(|one| one == language).then_some(name)
    });
    cases.collect()
}
