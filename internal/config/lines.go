package config

import (
	"strings"

	"github.com/pelletier/go-toml/v2/unstable"
)

// lines finds the line of each key and table of a text that is known to be TOML. Where several stand for one key (a table is named by each of its
// keys, if those are dotted), it is the first.
func lines(text []byte) map[string]int {
	found := map[string]int{}
	var p unstable.Parser
	p.Reset(text)
	table := ""
	for p.NextExpression() {
		switch e := p.Expression(); e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = mark(found, &p, "", e.Key())
		case unstable.KeyValue:
			keyLines(found, &p, table, e)
		}
	}
	return found
}

// keyLines finds the lines of a key and, when its value is an inline table, of those in it.
func keyLines(found map[string]int, p *unstable.Parser, table string, kv *unstable.Node) {
	path := mark(found, p, table, kv.Key())
	if v := kv.Value(); v.Kind == unstable.InlineTable {
		for it := v.Children(); it.Next(); {
			keyLines(found, p, path, it.Node())
		}
	}
}

// maxDepth is how many parts of a dotted key are looked at. All of a key's paths together take memory by the square of their number.
const maxDepth = 8

// mark takes note of where the parts of a dotted key stand, and returns its path.
func mark(found map[string]int, p *unstable.Parser, path string, key unstable.Iterator) string {
	for depth := 0; key.Next(); depth++ {
		if depth == maxDepth {
			break // no key of a file has so many parts: what it is under is blamed
		}
		n := key.Node()
		path = strings.TrimPrefix(path+"."+string(n.Data), ".")
		if found[path] == 0 {
			found[path] = p.Shape(n.Raw).Start.Line
		}
	}
	return path
}
