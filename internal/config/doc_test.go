package config

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// documented are the rows of docs/configuration.md by the heading that they stand under: a key, and whether it is marked live.
func documented(t *testing.T) map[string]map[string]bool {
	t.Helper()
	b, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	heading, row := regexp.MustCompile("^##+ (?:`\\[(\\w+)[^`]*`|(Rules of a port).*)"), regexp.MustCompile("^\\| `([a-z.-]+)` \\| [^|]+ \\| (live)? ?\\|")
	found, at := map[string]map[string]bool{}, ""
	for line := range strings.Lines(string(b)) {
		if m := heading.FindStringSubmatch(line); m != nil {
			at = m[1] + m[2]
			found[at] = map[string]bool{}
		} else if m := row.FindStringSubmatch(line); m != nil && at != "" {
			found[at][m[1]] = m[2] == "live"
		}
	}
	return found
}

func describe[T any](t *testing.T, rows map[string]bool, table string, ks keys[T]) {
	t.Helper()
	for _, k := range ks {
		live, ok := rows[k.name]
		if !ok {
			t.Errorf("docs/configuration.md does not have the key %s of [%s]", k.name, table)
		} else if live != k.live {
			t.Errorf("docs/configuration.md says live=%v of the key %s of [%s]", live, k.name, table)
		}
	}
	for name := range rows {
		if !slices.Contains(ks.names(), name) {
			t.Errorf("docs/configuration.md has the key %s of [%s], which there is not", name, table)
		}
	}
}

// TestEveryKeyIsDocumented: in the table of its section, live or not as it is; and nothing else is.
func TestEveryKeyIsDocumented(t *testing.T) {
	rows := documented(t)
	rules := rulesOf(func(r *Rules) *Rules { return r })
	describe(t, rows["log"], "log", logKeys)
	describe(t, rows["control"], "control", controlKeys)
	describe(t, rows["metrics"], "metrics", metricsKeys)
	describe(t, rows["sandbox"], "sandbox", sandboxKeys)
	describe(t, rows["switch"], "switch", switchKeys)
	describe(t, rows["port"], "port", portKeys.without(rules.names()...))
	describe(t, rows["uplink"], "uplink", uplinkKeys.without(rules.names()...))
	describe(t, rows["Rules of a port"], "port", rules)
}

// TestExampleIsRight reads the example of docs/configuration.md.
func TestExampleIsRight(t *testing.T) {
	b, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(b), "```toml\n")
	text, _, ok := strings.Cut(text, "```")
	c := parse(t, text)
	if !ok || len(c.Ports) != 4 || c.Ports["vm2"].FromGuest.Bytes != 125_000_000 || c.Ports["lab"].Switch != "" || c.Ports["router"].NoRouter || !c.Ports["vm1"].NoRouter {
		t.Errorf("%+v", c)
	}
}
