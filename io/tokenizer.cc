// SPDX-License-Identifier: Apache-2.0
// SentencePiece has no C interface: this file is the only C++ of the program. No exception leaves it.
#include "io/tokenizer.h"

#include <sys/stat.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include <jansson.h>
#include <sentencepiece_processor.h>

struct AddedToken {
  std::string text;
  int32_t id;
  bool strip_left, strip_right; /* white space before, after it goes too */
};

struct fd_tokenizer {
  std::string folder;
  sentencepiece::SentencePieceProcessor pieces;
  std::vector<AddedToken> added;           /* longest first */
  std::vector<int> added_by_first[256];    /* indices into `added`, longest first */
  int32_t vocabulary = 0, pad = 0, bos = -1;
  std::string bos_text, chat_template;
  bool pads_left = false;
};

struct fd_prompt {
  const fd_tokenizer *tokenizer; /* borrowed */
  std::string instruction;
  bool chat, generate;
  int64_t instruction_length, length;
};

namespace {

/* ---- text -------------------------------------------------------------------------------------------------------- */

/* The character at p (n bytes are left), its length in *bytes; -1 if it is not UTF-8. */
int32_t decode_character(const unsigned char *p, size_t n, size_t *bytes) {
  const int c = p[0];
  *bytes = 1;
  if (c < 0x80) return c;
  const size_t more = c >= 0xf0 ? 3 : c >= 0xe0 ? 2 : 1;
  if (c < 0xc2 || c > 0xf4 || n <= more) return -1;
  int32_t u = c & (0x3f >> more);
  for (size_t i = 1; i <= more; i++) {
    if ((p[i] & 0xc0) != 0x80) return -1;
    u = u << 6 | (p[i] & 0x3f);
  }
  if ((more == 2 && u < 0x800) || (more == 3 && u < 0x10000) || u > 0x10ffff || (u >= 0xd800 && u < 0xe000)) return -1;
  *bytes = more + 1;
  return u;
}

/* White space as Python's str.strip means it. */
bool is_space(int32_t u) {
  return (u >= 9 && u <= 13) || (u >= 0x1c && u <= 0x20) || u == 0x85 || u == 0xa0 || u == 0x1680 || (u >= 0x2000 && u <= 0x200a) ||
         u == 0x2028 || u == 0x2029 || u == 0x202f || u == 0x205f || u == 0x3000;
}

std::string_view strip_left(std::string_view s) {
  while (!s.empty()) {
    size_t bytes;
    if (!is_space(decode_character(reinterpret_cast<const unsigned char *>(s.data()), s.size(), &bytes))) break;
    s.remove_prefix(bytes);
  }
  return s;
}

std::string_view strip_right(std::string_view s) {
  while (!s.empty()) {
    size_t start = s.size() - 1, bytes;
    while (start > 0 && s.size() - start < 4 && (static_cast<unsigned char>(s[start]) & 0xc0) == 0x80) start--;
    const int32_t u = decode_character(reinterpret_cast<const unsigned char *>(s.data()) + start, s.size() - start, &bytes);
    if (!is_space(u) || start + bytes != s.size()) break;
    s.remove_suffix(bytes);
  }
  return s;
}

/* ---- opening ----------------------------------------------------------------------------------------------------- */

bool is_file(const std::string &path) {
  struct stat about;
  return stat(path.c_str(), &about) == 0 && S_ISREG(about.st_mode);
}

/* A special token is written as "<bos>" or as {"content": "<bos>", ...}. */
const char *token_text(const json_t *value) {
  if (json_is_object(value)) value = json_object_get(value, "content");
  return json_string_value(value);
}

struct Json {
  json_t *value = nullptr;
  Json() = default;
  Json(const Json &) = delete;
  ~Json() { json_decref(value); }
};

/* Integers as reals: model_max_length is 10^30 in published files. */
fd_status load_json(const std::string &path, Json *out) {
  json_error_t error;
  out->value = json_load_file(path.c_str(), JSON_ALLOW_NUL | JSON_DECODE_INT_AS_REAL, &error);
  if (!out->value) return FD_FAIL(FD_ERR_FORMAT, "%s: line %d: %s", path.c_str(), error.line, error.text);
  if (!json_is_object(out->value)) return FD_FAIL(FD_ERR_FORMAT, "%s: not a JSON object", path.c_str());
  return FD_OK;
}

fd_status add_token(fd_tokenizer *t, const char *text, int64_t id, const json_t *flags) {
  if (!text || !*text) return FD_OK;
  for (const AddedToken &a : t->added)
    if (a.text == text) return FD_OK;
  if (id < 0) { /* named without an id: a piece of the model */
    id = t->pieces.PieceToId(text);
    if (id == t->pieces.unk_id() && t->pieces.IdToPiece(static_cast<int>(id)) != text)
      return FD_FAIL(FD_ERR_FORMAT, "%s: special token \"%s\" is not a piece of tokenizer.model", t->folder.c_str(), text);
  }
  if (json_is_true(json_object_get(flags, "single_word")))
    return FD_FAIL(FD_ERR_UNSUPPORTED, "%s: added token \"%s\" with single_word is not supported", t->folder.c_str(), text);
  t->added.push_back({text, static_cast<int32_t>(id), json_is_true(json_object_get(flags, "lstrip")), json_is_true(json_object_get(flags, "rstrip"))});
  if (id >= t->vocabulary) t->vocabulary = static_cast<int32_t>(id) + 1;
  return FD_OK;
}

int32_t id_of(const fd_tokenizer *t, const char *text, int32_t otherwise) {
  if (text)
    for (const AddedToken &a : t->added)
      if (a.text == text) return a.id;
  return otherwise;
}

fd_status open_folder(const char *folder, fd_tokenizer *t) {
  t->folder = folder;
  const std::string base = std::string(folder) + "/", model = base + "tokenizer.model";
  if (!is_file(model)) {
    const bool clip = is_file(base + "vocab.json"), fast = is_file(base + "tokenizer.json");
    if (clip || fast)
      return FD_FAIL(FD_ERR_UNSUPPORTED, "%s: has %s but no tokenizer.model; only SentencePiece tokenizers are supported", folder,
                     clip ? "vocab.json" : "tokenizer.json");
    return FD_FAIL(FD_ERR_IO, "%s: no tokenizer.model there", folder);
  }
  if (!t->pieces.Load(model).ok()) return FD_FAIL(FD_ERR_FORMAT, "%s: not a SentencePiece model", model.c_str());
  t->vocabulary = t->pieces.GetPieceSize();

  Json config, map;
  if (is_file(base + "tokenizer_config.json")) {
    fd_status st = load_json(base + "tokenizer_config.json", &config);
    if (st != FD_OK) return st;
  }
  if (is_file(base + "special_tokens_map.json")) {
    fd_status st = load_json(base + "special_tokens_map.json", &map);
    if (st != FD_OK) return st;
  }
  const char *key;
  json_t *value;
  json_t *decoder = json_object_get(config.value, "added_tokens_decoder");
  json_object_foreach(decoder, key, value) {
    char *end;
    const long id = strtol(key, &end, 10);
    if (*end || end == key || id < 0 || id > INT32_MAX || !token_text(value))
      return FD_FAIL(FD_ERR_FORMAT, "%stokenizer_config.json: added_tokens_decoder has an entry \"%s\" that is no token", base.c_str(), key);
    fd_status st = add_token(t, token_text(value), id, value);
    if (st != FD_OK) return st;
  }
  static const char *const named[] = {"bos_token", "eos_token", "unk_token", "pad_token"};
  const char *special[4];
  for (int i = 0; i < 4; i++) {
    value = json_object_get(config.value, named[i]);
    if (!token_text(value)) value = json_object_get(map.value, named[i]);
    special[i] = token_text(value);
    if (!special[i] && !config.value && !map.value) { /* a bare tokenizer.model: Gemma's names */
      static const char *const gemma[] = {"<bos>", "<eos>", "<unk>", "<pad>"};
      if (t->pieces.PieceToId(gemma[i]) != t->pieces.unk_id() || i == 2) special[i] = gemma[i];
    }
    /* tokenizer.model may call the same piece "<s>": then it is the one that has this role there */
    const int role[] = {t->pieces.bos_id(), t->pieces.eos_id(), t->pieces.unk_id(), t->pieces.pad_id()};
    const int piece = special[i] ? t->pieces.PieceToId(special[i]) : -1;
    const bool named_so = piece >= 0 && t->pieces.IdToPiece(piece) == special[i];
    fd_status st = add_token(t, special[i], named_so ? -1 : role[i], json_is_object(value) ? value : nullptr);
    if (st != FD_OK) return st;
  }
  json_t *more = json_object_get(config.value, "additional_special_tokens");
  if (!more) more = json_object_get(map.value, "additional_special_tokens");
  size_t i;
  json_array_foreach(more, i, value) {
    fd_status st = add_token(t, token_text(value), -1, value);
    if (st != FD_OK) return st;
  }
  std::stable_sort(t->added.begin(), t->added.end(), [](const AddedToken &a, const AddedToken &b) { return a.text.size() > b.text.size(); });
  for (size_t a = 0; a < t->added.size(); a++) t->added_by_first[static_cast<unsigned char>(t->added[a].text[0])].push_back(static_cast<int>(a));

  t->pad = id_of(t, special[3], 0);
  if (!json_is_false(json_object_get(config.value, "add_bos_token"))) {
    t->bos = id_of(t, special[0], t->pieces.bos_id());
    if (t->bos < 0) return FD_FAIL(FD_ERR_FORMAT, "%s: the tokenizer adds a first token but names no bos_token", folder);
  }
  t->bos_text = special[0] ? special[0] : "";
  if (json_is_true(json_object_get(config.value, "add_eos_token")))
    return FD_FAIL(FD_ERR_UNSUPPORTED, "%stokenizer_config.json: add_eos_token = true is not supported", base.c_str());
  const char *cut = json_string_value(json_object_get(config.value, "truncation_side"));
  if (cut && strcmp(cut, "right") != 0)
    return FD_FAIL(FD_ERR_UNSUPPORTED, "%stokenizer_config.json: truncation_side = \"%s\": only \"right\" is built", base.c_str(), cut);
  const char *side = json_string_value(json_object_get(config.value, "padding_side"));
  if (side && strcmp(side, "left") != 0 && strcmp(side, "right") != 0)
    return FD_FAIL(FD_ERR_FORMAT, "%stokenizer_config.json: padding_side = \"%s\" is neither left nor right", base.c_str(), side);
  t->pads_left = side && strcmp(side, "left") == 0;
  const char *chat = json_string_value(json_object_get(config.value, "chat_template"));
  t->chat_template = chat ? chat : "";
  return FD_OK;
}

/* ---- encoding ---------------------------------------------------------------------------------------------------- */

struct Ids {
  int32_t *at;
  int64_t n, capacity;
  void push(int32_t id) {
    if (n < capacity) at[n] = id;
    n++;
  }
};

void encode_plain(const fd_tokenizer *t, std::string_view text, Ids *out) {
  if (text.empty()) return;
  std::vector<int> ids;
  if (!t->pieces.Encode(text, &ids).ok()) return;
  for (int id : ids) out->push(id);
}

void encode(const fd_tokenizer *t, std::string_view text, Ids *out) {
  size_t from = 0; /* of the plain text before the next added token */
  bool strip = false;
  for (size_t i = 0; i < text.size();) {
    const AddedToken *hit = nullptr;
    for (int a : t->added_by_first[static_cast<unsigned char>(text[i])])
      if (text.compare(i, t->added[static_cast<size_t>(a)].text.size(), t->added[static_cast<size_t>(a)].text) == 0) {
        hit = &t->added[static_cast<size_t>(a)];
        break;
      }
    if (!hit) {
      i++;
      continue;
    }
    std::string_view before = text.substr(from, i - from);
    if (strip) before = strip_left(before);
    if (hit->strip_left) before = strip_right(before);
    encode_plain(t, before, out);
    out->push(hit->id);
    strip = hit->strip_right;
    i += hit->text.size();
    from = i;
  }
  encode_plain(t, strip ? strip_left(text.substr(from)) : text.substr(from), out);
}

/* Gemma's template for one user turn; bos is part of it. */
std::string render_chat(const fd_prompt *p, std::string_view content) {
  std::string s = p->tokenizer->bos_text + "<start_of_turn>user\n";
  s += strip_left(strip_right(content));
  s += "<end_of_turn>\n";
  if (p->generate) s += "<start_of_turn>model\n";
  return s;
}

/* What the template must do, looked for in its text: a template language is not built in. */
bool is_gemma_template(const std::string &s) {
  for (const char *part : {"{{ bos_token }}", "<start_of_turn>", "<end_of_turn>\\n", "message['content'] | trim", "<start_of_turn>model\\n"})
    if (s.find(part) == std::string::npos) return false;
  return true;
}

}  // namespace

extern "C" {

bool fd_utf8_valid(const void *text, size_t bytes) {
  const unsigned char *p = static_cast<const unsigned char *>(text);
  for (size_t i = 0, step; i < bytes; i += step)
    if (decode_character(p + i, bytes - i, &step) < 0) return false;
  return true;
}

fd_status fd_tokenizer_open(const char *folder, fd_tokenizer **out) {
  try {
    fd_tokenizer *t = new fd_tokenizer;
    const fd_status st = open_folder(folder, t);
    if (st != FD_OK) {
      delete t;
      return st;
    }
    *out = t;
    return FD_OK;
  } catch (const std::bad_alloc &) {
    return FD_FAIL(FD_ERR_NOMEM, "%s: no memory for the tokenizer", folder);
  }
}

void fd_tokenizer_destroy(fd_tokenizer **t) {
  delete *t;
  *t = nullptr;
}

int fd_tokenizer_vocabulary(const fd_tokenizer *t) { return t->vocabulary; }
int32_t fd_tokenizer_pad_id(const fd_tokenizer *t) { return t->pad; }
int32_t fd_tokenizer_bos_id(const fd_tokenizer *t) { return t->bos; }
bool fd_tokenizer_pads_left(const fd_tokenizer *t) { return t->pads_left; }

int64_t fd_tokenizer_encode(const fd_tokenizer *t, const char *text, size_t bytes, bool add_bos, int32_t *ids, int64_t capacity) {
  Ids out = {ids, 0, capacity};
  if (add_bos && t->bos >= 0) out.push(t->bos);
  encode(t, std::string_view(text ? text : "", bytes), &out);
  return out.n;
}

fd_status fd_prompt_create(const fd_tokenizer *t, const struct fd_prompt_config *config, fd_prompt **out) {
  const char *instruction = config->instruction ? config->instruction : "";
  if (config->max_prompt_length < 1 || config->max_prompt_length > 1000000)
    return FD_FAIL(FD_ERR_CONFIG, "data.max_prompt_length = %lld: 1 to 1000000 tokens are possible", static_cast<long long>(config->max_prompt_length));
  if (config->apply_chat_template && !is_gemma_template(t->chat_template))
    return FD_FAIL(FD_ERR_UNSUPPORTED, "data.apply_chat_template: %s has %s; set it to false", t->folder.c_str(),
                   t->chat_template.empty() ? "no chat template" : "a chat template other than Gemma's, which is the only one supported");
  fd_prompt *p = new (std::nothrow) fd_prompt{t, instruction, config->apply_chat_template, config->add_generation_prompt, 0, 0};
  if (!p) return FD_FAIL(FD_ERR_NOMEM, "no memory for a prompt");
  Ids count = {nullptr, 0, 0};
  if (p->chat) {
    encode(t, render_chat(p, p->instruction), &count); /* the whole empty turn */
  } else {
    if (t->bos >= 0) count.push(t->bos);
    if (!p->instruction.empty()) encode(t, strip_right(p->instruction), &count); /* the blank at its end joins the caption's first word */
  }
  /* cut as a caption is; one less for bos, which the original takes off whether there is one or not (then, without an instruction, it is -1) */
  p->instruction_length = std::min(count.n, config->max_prompt_length) - 1;
  p->length = std::max<int64_t>(config->max_prompt_length + p->instruction_length, 1);
  *out = p;
  return FD_OK;
}

void fd_prompt_destroy(fd_prompt **p) {
  delete *p;
  *p = nullptr;
}

int64_t fd_prompt_instruction_length(const fd_prompt *p) { return p->instruction_length; }
int64_t fd_prompt_length(const fd_prompt *p) { return p->length; }

int64_t fd_prompt_encode(const fd_prompt *p, const char *caption, size_t bytes, int32_t *ids) {
  Ids out = {ids, 0, p->length};
  std::string text;
  if (caption) text.append(p->instruction).append(caption, bytes);
  if (p->chat && !text.empty()) {
    encode(p->tokenizer, render_chat(p, text), &out);
  } else {
    if (p->tokenizer->bos >= 0) out.push(p->tokenizer->bos);
    encode(p->tokenizer, text, &out);
  }
  return out.n < p->length ? out.n : p->length;
}

}  // extern "C"
